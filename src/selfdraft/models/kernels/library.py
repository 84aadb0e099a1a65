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
from typing import Any

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
FORMATS = {"bf16": 0, "f32": 1, "q8": 2, "q4": 3, "q6": 4}
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
        self._lib.selfdraft_pack.restype = None
        self._lib.selfdraft_pack.argtypes = [
            ctypes.c_int,
            *[ctypes.c_void_p] * 3,
            ctypes.c_int64,
            ctypes.c_int,
            *[ctypes.c_int64] * 2,
            ctypes.c_void_p,
        ]
        self._lib.selfdraft_noise.restype = None
        self._lib.selfdraft_noise.argtypes = [
            ctypes.c_uint64,
            *[ctypes.c_uint32] * 2,
            ctypes.c_int,
            ctypes.c_void_p,
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

    def empty(self, kind: str, outs: int, ins: int) -> NDArray[np.uint8]:
        """Room for a packed matrix of that format."""
        return np.zeros(self._lib.selfdraft_packed_bytes(FORMATS[kind], outs, ins), np.uint8)

    def pack(
        self,
        kind: str,
        values: NDArray[Any],
        scales: NDArray[np.uint16] | None,
        minima: NDArray[np.uint16] | None,
        first: int,
        out: NDArray[np.uint8],
    ) -> None:
        """Pack rows as the outputs from `first` on. values: [outs, ins] uint16 (bf16), float32, int8 (q8) or
        uint8 from 0 to 15 (q4). scales, minima: [outs, ins / 32], float16 as uint16."""
        arrays = [None if part is None else np.ascontiguousarray(part) for part in (values, scales, minima)]
        outs, ins = values.shape
        pointers = [None if part is None else part.ctypes.data for part in arrays]
        self._lib.selfdraft_pack(FORMATS[kind], *pointers, outs, ins, first, 1, out.ctypes.data)

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
