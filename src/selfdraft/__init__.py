"""selfdraft: several tokens per forward pass from one model, and the same text.

    import selfdraft

    model = selfdraft.load("pico", method="llma")
    print(model.generate("def add(a, b):").text)

Names are imported when first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversation import Conversation
    from .drafting.method import Drafter, Method, Request
    from .engine.engine import Engine
    from .engine.request import Limits, Session, TokenLogprob
    from .engine.step import Step
    from .engine.tree import Tree
    from .errors import SelfdraftError
    from .integrations.transformers import hook
    from .llm import Stream, TextGenerator, load
    from .params import Chunk, Options, Result
    from .sampling.sampler import Sampler

__version__ = "0.1.0.dev0"

__all__ = [
    "Chunk",
    "Conversation",
    "Drafter",
    "Engine",
    "Limits",
    "Method",
    "Options",
    "Request",
    "Result",
    "Sampler",
    "SelfdraftError",
    "Session",
    "Step",
    "Stream",
    "TextGenerator",
    "TokenLogprob",
    "Tree",
    "hook",
    "load",
]

_HOME = {
    "conversation": ("Conversation",),
    "drafting.method": ("Drafter", "Method", "Request"),
    "engine.engine": ("Engine",),
    "engine.request": ("Limits", "Session", "TokenLogprob"),
    "engine.step": ("Step",),
    "engine.tree": ("Tree",),
    "errors": ("SelfdraftError",),
    "integrations.transformers": ("hook",),
    "llm": ("Stream", "TextGenerator", "load"),
    "params": ("Chunk", "Options", "Result"),
    "sampling.sampler": ("Sampler",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
