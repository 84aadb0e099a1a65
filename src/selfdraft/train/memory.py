"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys


def keep_memory() -> None:
    """Let glibc keep freed memory: fresh pages for each step's logits cost more than the step (measured in
    recipes/pico/README.md). For a process that trains; nothing happens elsewhere than on Linux."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for large blocks
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
