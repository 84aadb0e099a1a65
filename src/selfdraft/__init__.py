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
    from .answer import Chunk, Options, Result
    from .conversation import Conversation
    from .engine import Engine
    from .errors import SelfdraftError
    from .generation import Stream, TextGenerator, load
    from .huggingface import hook
    from .method import Drafter, Method, Request
    from .sampling import Sampler
    from .session import Limits, Session, TokenLogprob
    from .step import Step
    from .tree import Tree

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
    "engine": ("Engine",),
    "errors": ("SelfdraftError",),
    "answer": ("Chunk", "Options", "Result"),
    "generation": ("Stream", "TextGenerator", "load"),
    "huggingface": ("hook",),
    "method": ("Drafter", "Method", "Request"),
    "sampling": ("Sampler",),
    "session": ("Limits", "Session", "TokenLogprob"),
    "step": ("Step",),
    "tree": ("Tree",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
