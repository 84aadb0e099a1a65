"""What transformers calls the cache of keys and values: `cache` since 5.24, `past_key_values` before.

A forward of the user's own, from remote code, may keep the old name; it is asked what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import LlamaModel

OLD = "past_key_values"


def cache_name(forward: Callable[..., Any]) -> str | None:
    """The name by which a function takes the cache; None where it names none."""
    taken = inspect.signature(forward).parameters
    return next((name for name in ("cache", OLD) if name in taken), None)


CACHE = cache_name(LlamaModel.forward) or OLD  # what transformers' own code takes and returns
