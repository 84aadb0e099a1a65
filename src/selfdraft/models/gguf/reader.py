"""Reads a GGUF file: its metadata and its tensors, checked against the file's size before anything is used.

The header is parsed here and not by the `gguf` package, whose reader makes an array of every string: with
a vocabulary of 150,000 tokens that takes half a minute. Its tables of tensor types and its dequantisation
are used as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelCorrupt, ModelUnsupported
from ..mapped_file import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file, and how its numbers are stored."""

    name: str
    kind: int
    """The number of its type in ggml (GGMLQuantizationType)."""
    shape: tuple[int, ...]
    """Rows first, as in torch."""
    offset: int
    """Bytes from the beginning of the file."""
    size: int
    """Bytes."""


class GgufFile:
    """A GGUF file, mapped into memory. Raises ModelNotFound, ModelCorrupt or ModelUnsupported."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or str(path)
        self._file = MappedFile(path, self.name)
        self.release = self._file.release
        self._bytes = self._file.bytes(0, len(self._file)).data
        self._at = 0
        self.metadata: Mapping[str, Any] = {}
        self.tensors: Mapping[str, Tensor] = {}
        self._read_header()

    def raw(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's bytes as they are in the file."""
        return self._file.bytes(tensor.offset, tensor.size)

    def array(self, tensor: Tensor) -> NDArray[np.float32]:
        """The tensor in float32. Raises ModelUnsupported for a type that the gguf package cannot read."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType(tensor.kind)
        rows = self.raw(tensor).reshape(quant_shape_to_byte_shape(tensor.shape, kind))
        try:
            return np.asarray(dequantize(rows, kind), np.float32).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ModelUnsupported(
                f"{self.name}: tensor {tensor.name} is stored as {kind.name}, which cannot be converted"
            ) from error

    def _read_header(self) -> None:
        if bytes(self._bytes[:4]) != MAGIC:
            raise ModelCorrupt(f"{self.name} is not a GGUF file: it does not begin with GGUF")
        self._at = 4
        version = self._number("<u4")
        if version not in VERSIONS:
            supported = " and ".join(map(str, VERSIONS))
            raise ModelUnsupported(f"{self.name}: GGUF version {version}; versions {supported} are read")
        tensors, fields = self._number("<u8"), self._number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string()
            metadata[key] = self._value(self._number("<u4"))
        self.metadata = metadata
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelCorrupt(f"{self.name}: alignment {alignment!r} is not a positive number")
        start = -(-self._at // alignment) * alignment
        self.tensors = {info[0]: self._placed(start, *info) for info in infos}

    def _placed(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        """A tensor whose type is known and whose bytes lie within the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ModelUnsupported(f"{self.name}: tensor {name} has the unknown type {kind}") from error
        elements = 1
        for width in shape:
            elements *= width
        if not shape or elements == 0 or shape[-1] % block:
            raise ModelCorrupt(f"{self.name}: tensor {name} has the impossible shape {list(shape)}")
        size = elements // block * block_size
        end = start + offset + size
        if end > len(self._bytes):
            raise ModelCorrupt(
                f"{self.name}: tensor {name} ends at byte {end:,} of a file of {len(self._bytes):,}; "
                "the file is truncated or damaged"
            )
        return Tensor(name, kind, shape, start + offset, size)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("<u4")
        if dimensions > MAX_DIMENSIONS:
            raise ModelCorrupt(f"{self.name}: tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        return name, shape, self._number("<u4"), self._number("<u8")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise ModelCorrupt(f"{self.name}: metadata of the unknown type {kind} at byte {self._at:,}")
        kind, count = self._number("<u4"), self._number("<u8")
        if kind in SCALARS:
            return np.frombuffer(self._take(np.dtype(SCALARS[kind]).itemsize * count), SCALARS[kind]).tolist()
        self._need(count)  # every element takes a byte or more
        if kind == STRING:
            return self._strings(count)
        return [self._value(kind) for _ in range(count)]

    def _number(self, dtype: str) -> Any:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0].item()

    def _string(self) -> str:
        self._need(8)
        (length,) = struct.unpack_from("<Q", self._bytes, self._at)
        self._at += 8
        return self._take(length).decode("utf-8", "replace")

    def _strings(self, count: int) -> list[str]:
        """As `_string`, in a loop that a vocabulary of 150,000 tokens goes through in a tenth of a second."""
        contents, at, end = self._bytes, self._at, len(self._bytes)
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            if at + 8 > end:
                break
            (length,) = unpack(contents, at)
            at += 8 + length
            found.append(str(contents[at - length : at], "utf-8", "replace"))
        self._need(at - self._at if len(found) == count else end)
        self._at = at
        return found

    def _take(self, count: int) -> bytes:
        self._need(count)
        taken = bytes(self._bytes[self._at : self._at + count])
        self._at += count
        return taken

    def _need(self, count: int) -> None:
        if self._at + count > len(self._bytes):
            raise ModelCorrupt(
                f"{self.name}: the file ends within its header, at byte {len(self._bytes):,}; "
                "it is truncated or damaged"
            )
