"""Reads a safetensors file: a JSON header, then the tensors, mapped into memory and checked against its size.

The safetensors package maps a file, too, but cannot let go of the pages that were read, so that memory would
hold the weights twice while they are packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelCorrupt
from .mapped_file import MappedFile

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Of a number, by the names that the format and ggml share."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file, and how its numbers are stored."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    size: int
    """Bytes."""


class SafetensorsFile:
    """A file of the safetensors format. Raises ModelNotFound or ModelCorrupt."""

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self.release = self._file.release
        self._name = str(path)
        length = int.from_bytes(self._file.bytes(0, 8).tobytes(), "little")
        try:
            header: Mapping[str, Any] = json.loads(self._file.bytes(8, length).tobytes())
            found = {name: about for name, about in header.items() if name != "__metadata__"}
            self.tensors = {name: self._placed(name, about, 8 + length) for name, about in found.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelCorrupt(f"{self._name}: its header is damaged ({error})") from error

    def raw(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's bytes as they are in the file."""
        return self._file.bytes(tensor.offset, tensor.size)

    def _placed(self, name: str, about: Mapping[str, Any], start: int) -> Tensor:
        kind, shape = str(about["dtype"]), tuple(map(int, about["shape"]))
        begin, end = map(int, about["data_offsets"])
        if kind in BYTES and end - begin != math.prod(shape) * BYTES[kind]:
            raise ModelCorrupt(
                f"{self._name}: tensor {name} of {list(shape)} {kind} has {end - begin:,} bytes"
            )
        if not 0 <= begin <= end or start + end > len(self._file):
            raise ModelCorrupt(
                f"{self._name}: tensor {name} ends at byte {start + end:,} of a file of {len(self._file):,}; "
                "the file is truncated or damaged"
            )
        return Tensor(kind, shape, start + begin, end - begin)
