"""Memory for packed weights, in huge pages where the system has them.

A step reads every weight once, and for each page the processor has to find out where in memory it lies; in a
virtual machine that takes two searches. There are 512 times fewer pages of 2 MiB than of 4 KiB. Linux gives
them to memory that asks for them, and NumPy asks for arrays of 4 MiB and more. Most matrices of a small model
are smaller; so they are cut from arrays that are not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGE = 4 << 20  # bytes; NumPy asks for huge pages from here on
CHUNK = 64 << 20  # bytes; what is not used of the last one takes no memory, since nobody writes to it
ALIGNED = 64  # bytes; a line of the caches


class WeightMemory:
    """Gives out arrays: large ones of their own, and small ones cut from a larger one, which lives as long as
    any of them."""

    def __init__(self) -> None:
        self._free = np.zeros(0, np.uint8)

    def zeros(self, size: int) -> NDArray[np.uint8]:
        """An array of so many bytes, all 0, that begins at a multiple of `ALIGNED`."""
        if size >= LARGE:
            return _aligned(np.zeros(size + ALIGNED, np.uint8))[:size]
        if size > len(self._free):
            self._free = _aligned(np.zeros(CHUNK, np.uint8))
        cut, self._free = self._free[:size], _aligned(self._free[size:])
        return cut


def _aligned(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return array[-array.ctypes.data % ALIGNED :]
