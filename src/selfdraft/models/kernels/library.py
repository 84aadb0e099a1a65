"""The CPU kernels: a library of C, built for several instruction sets, of which the best one for this
processor is loaded.

Builds lie beside this file in `lib/`, where the package's build puts them (`build.py`). `SELFDRAFT_KERNELS`
names another one than the best, to compare them: avx512, avx2, neon, portable; or none, for transformers'
forward.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._common.machine import processor_flags
from ...errors import InvalidOption
from . import structures

LOG = logging.getLogger("selfdraft")
LIB = Path(os.environ.get("SELFDRAFT_KERNELS_FOLDER") or Path(__file__).parent / "lib")
CHOICE = "SELFDRAFT_KERNELS"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon": {"asimd", "asimddp"},
    "portable": set[str](),
}
"""Builds, the best first, with the processor's flags that they need."""
FORMATS = {name: i for i, name in enumerate(("bf16", "f16", "f32", "q8", "q4", "q5", "q6"))}
"""Packed weights, see `cpu/weights.h`."""


class WeightType(NamedTuple):
    """A type of weights in checkpoints that the kernels read, see `cpu/blocks.h`."""

    number: int
    """ggml's."""
    format: str
    """The one that holds all its values."""


WEIGHT_TYPES = {
    "F32": WeightType(0, "f32"),
    "F16": WeightType(1, "f16"),
    "BF16": WeightType(30, "bf16"),
    "Q4_0": WeightType(2, "q4"),
    "Q4_1": WeightType(3, "q4"),
    "Q4_K": WeightType(12, "q4"),
    "Q5_0": WeightType(6, "q5"),
    "Q5_1": WeightType(7, "q5"),
    "Q5_K": WeightType(13, "q5"),
    "Q6_K": WeightType(14, "q6"),
    "Q8_0": WeightType(8, "q8"),
    "IQ4_NL": WeightType(20, "q8"),
}
"""By ggml's names. Scales of the types K are rounded to half precision, by at most 0.05 %."""
SIZES = (
    "lanes",
    "pairs",
    "page",
    "part",
    "block_rows",
    "queries",
    "tree_slots",
    "scratch_bytes",
    "layers",
    "row_floats",
)


class Library:
    """One loaded build."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        """Of the library's file."""
        self._lib = ctypes.CDLL(str(path))
        self._lib.selfdraft_packed_bytes.restype = ctypes.c_int64
        self._lib.selfdraft_packed_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
        self._lib.selfdraft_row_bytes.restype = ctypes.c_int64
        self._lib.selfdraft_row_bytes.argtypes = [ctypes.c_int] * 2
        self._lib.selfdraft_pack.argtypes = [
            *[ctypes.c_int] * 2,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        self._lib.selfdraft_noise.restype = None
        self._lib.selfdraft_noise.argtypes = [
            ctypes.c_uint64,
            *[ctypes.c_uint32] * 2,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        self._lib.selfdraft_noise_of.restype = None
        self._lib.selfdraft_noise_of.argtypes = [
            ctypes.c_uint64,
            *[ctypes.c_uint32] * 2,
            ctypes.c_int,
            *[ctypes.c_void_p] * 2,
        ]
        self._lib.selfdraft_draw.argtypes = [
            ctypes.c_void_p,
            ctypes.c_float,
            ctypes.c_uint64,
            *[ctypes.c_uint32] * 2,
            ctypes.c_int,
        ]
        self._lib.selfdraft_step.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int]
        self._lib.selfdraft_logits.argtypes = [
            *[ctypes.c_void_p] * 3,
            ctypes.c_int,
            *[ctypes.c_void_p] * 2,
            ctypes.c_int,
        ]
        self._lib.selfdraft_shortlist.restype = None
        self._lib.selfdraft_shortlist.argtypes = [
            *[ctypes.c_void_p] * 3,
            *[ctypes.c_int] * 3,
            ctypes.c_void_p,
        ]
        sizes = {name: int(self._lib.selfdraft_sizes(i)) for i, name in enumerate(SIZES)}
        self.lanes, self.page, self.block_rows = sizes["lanes"], sizes["page"], sizes["block_rows"]
        self.tree_slots, self.scratch_bytes = sizes["tree_slots"], sizes["scratch_bytes"]
        self.row_floats = sizes["row_floats"]

    def padded(self, outs: int) -> int:
        """Outputs of a packed matrix: whole pairs of panels."""
        return -(-outs // (2 * self.lanes)) * 2 * self.lanes

    def packed_bytes(self, format: str, outs: int, ins: int) -> int:
        """The size of a packed matrix of that format."""
        return int(self._lib.selfdraft_packed_bytes(FORMATS[format], outs, ins))

    def pack(
        self,
        kind: str,
        rows: NDArray[np.uint8],
        ins: int,
        format: str,
        first: int,
        out: NDArray[np.uint8],
        threads: int,
    ) -> None:
        """Pack rows of weights of a type, [outs, bytes of a row], as the outputs from `first` on of a matrix
        in a format: `WEIGHT_TYPES[kind].format`, bf16, f16, f32, q8 or q4."""
        number = WEIGHT_TYPES[kind].number
        assert rows.flags.c_contiguous
        assert rows.shape[1] == self._lib.selfdraft_row_bytes(number, ins) > 0, (kind, rows.shape, ins)
        pointers = rows.ctypes.data, out.ctypes.data
        if not self._lib.selfdraft_pack(
            number, FORMATS[format], pointers[0], len(rows), ins, first, pointers[1], threads
        ):
            raise AssertionError(f"{kind} cannot be packed as {format}")

    def step(
        self,
        model: structures.Model,
        memory: structures.Memory,
        batch: structures.Batch,
        work: structures.Work,
        adapter: structures.Adapter | None,
        threads: int,
    ) -> None:
        """Run rows through the model; see `cpu/step.h`. adapter: at work on the mask rows."""
        pointers = (_address(part) for part in (model, memory, batch, work, adapter))
        if self._lib.selfdraft_step(*pointers, threads) < 1:
            raise AssertionError("the step was refused")

    def logits(
        self,
        model: structures.Model,
        work: structures.Work,
        adapter: structures.Adapter | None,
        rows: Sequence[int],
        previous: Sequence[int] | None,
        threads: int,
    ) -> None:
        """Logits and picks of some rows of the last step. previous: per row the token that the adapter's
        sampler head sees; None: without that head."""
        index = np.array(rows, np.int32)
        before = None if previous is None else np.array(previous, np.int32)
        pointers = (_address(part) for part in (model, work, adapter))
        told = None if before is None else before.ctypes.data
        self._lib.selfdraft_logits(*pointers, len(index), index.ctypes.data, told, threads)

    def shortlist(
        self,
        model: structures.Model,
        work: structures.Work,
        adapter: structures.Adapter,
        row: int,
        previous: int,
        logits: NDArray[np.float32],
        size: int,
    ) -> None:
        """Let the adapter's sampler head, which sees a token, correct the largest logits of a mask row of the
        last step, [vocabulary], in place: so many, at most 512. The others become minus infinity."""
        pointers = (_address(part) for part in (model, work, adapter))
        self._lib.selfdraft_shortlist(*pointers, row, previous, min(size, len(logits)), logits.ctypes.data)

    def noise(self, seed: int, sample: int, positions: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
        """Gumbel noise, [positions, vocabulary]; see `cpu/noise.c`."""
        out = np.empty((len(positions), vocabulary), np.float32)
        for row, position in zip(out, positions, strict=True):
            self._lib.selfdraft_noise(seed, sample, position, vocabulary, row.ctypes.data)
        return out

    def noise_of(self, seed: int, sample: int, position: int, tokens: Sequence[int]) -> Sequence[float]:
        """The noise of these tokens at one index of a text, the same bits as in `noise`."""
        count = len(tokens)
        made = (ctypes.c_float * count)()
        self._lib.selfdraft_noise_of(seed, sample, position, count, (ctypes.c_int32 * count)(*tokens), made)
        return list(made)

    def draw(
        self, logits: int, temperature: float, seed: int, sample: int, position: int, vocabulary: int
    ) -> int:
        """The token with the best score. logits: the address of float32 [vocabulary]."""
        return int(self._lib.selfdraft_draw(logits, temperature, seed, sample, position, vocabulary))


def _address(structure: ctypes.Structure | None) -> Any:
    return None if structure is None else ctypes.byref(structure)


def flags() -> set[str]:
    """The processor's instruction sets, as Linux names them; empty where the system does not report them."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return NEEDS["neon"]  # which all of Apple's own processors have
    if sys.platform == "win32":
        has_avx2 = ctypes.windll.kernel32.IsProcessorFeaturePresent(
            40
        )  # whose processors have FMA and F16C too
        return NEEDS["avx2"] if has_avx2 else set()
    return processor_flags()


def builds() -> list[str]:
    """Names of the builds that are here and that this processor can run, the best first."""
    have = flags()
    here = [name for name in NEEDS if (LIB / f"{name}{SUFFIX}").is_file()]
    return [name for name in here if have >= NEEDS[name]]


@cache
def library() -> Library | None:
    """The best build, or the one that SELFDRAFT_KERNELS names; None without one. Raises InvalidOption for a
    build that cannot run here."""
    asked = os.environ.get(CHOICE)
    if asked == "none":
        return None
    found = builds()
    if asked and asked not in found:
        listed = ", ".join([*found, "none"])
        raise InvalidOption(f"{CHOICE}={asked}: this machine ({platform.machine()}) can run: {listed}")
    name = asked or next(iter(found), None)
    if name is None:
        LOG.warning(
            "the CPU kernels were not built, so models go through transformers' forward, which is slower; "
            "install a C compiler and then this package again (%s=none is silent)",
            CHOICE,
        )
    elif name == "portable" and not asked:
        LOG.warning("this processor has neither AVX2 nor NEON's dot products: the portable kernels are slow")
    try:
        return Library(LIB / f"{name}{SUFFIX}", name) if name else None
    except AttributeError:  # a symbol is missing
        LOG.warning(
            "the CPU kernels are older than this package, so models go through transformers' forward, "
            "which is slower; build them anew: python -m selfdraft.models.kernels.build"
        )
        return None
