"""Memory for packed weights, in huge pages where the system has them.

A step reads every weight once, so in pages of 4 KiB it needs a new translation for each of them, and in a
virtual machine each of these takes two walks through page tables. Pages of 2 MiB spare nearly all of that.
Linux gives them to memory that asks for them, and NumPy asks for arrays of 4 MiB and more. Most matrices of a
small model are smaller; so they are cut from arrays that are not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHUNK = 64 << 20  # bytes; what is not used of the last one takes no memory, since nobody writes to it
ALIGNED = 64  # bytes; a line of the caches


class WeightMemory:
    """Cuts arrays from larger ones, which live as long as any array that was cut from them."""

    def __init__(self) -> None:
        self._free = np.zeros(0, np.uint8)

    def zeros(self, size: int) -> NDArray[np.uint8]:
        """An array of so many bytes, all 0, that begins at a multiple of `ALIGNED`."""
        skipped = -self._free.ctypes.data % ALIGNED
        if skipped + size > len(self._free):
            self._free = np.zeros(max(CHUNK, size + ALIGNED), np.uint8)
            skipped = -self._free.ctypes.data % ALIGNED
        cut = self._free[skipped : skipped + size]
        self._free = self._free[skipped + size :]
        return cut
