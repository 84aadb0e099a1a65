"""How the C library treats freed memory."""

from __future__ import annotations

import ctypes
import sys


def keep_memory() -> None:
    """Let glibc keep freed memory, because fresh pages for the logits of each step cost more than the step.

    For processes that train a small model. Does nothing on other systems than Linux.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no mmap for large blocks
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap
