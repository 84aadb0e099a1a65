"""A file mapped into memory, whose pages can be let go."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelCorrupt, ModelNotFound


class MappedFile:
    """The bytes of a file, read where they are used. Raises ModelNotFound."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or str(path)
        self._map: mmap.mmap | None = None
        try:
            with path.open("rb") as file:
                if path.stat().st_size:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelNotFound(f"{self.name} cannot be read: {error.strerror or error}") from error
        self._bytes = np.frombuffer(self._map or b"", np.uint8)

    def __len__(self) -> int:
        return len(self._bytes)

    def bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        """A view. Raises ModelCorrupt beyond the file's end."""
        if not 0 <= offset <= offset + count <= len(self):
            raise ModelCorrupt(
                f"{self.name}: the file ends at byte {len(self):,}; it is truncated or damaged"
            )
        return self._bytes[offset : offset + count]

    def release(self) -> None:
        """Give back the memory of what was read so far; the system reads it again where it is used."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
