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
    from .drafting.method import DraftContext, Drafter, Method
    from .engine.engine import Engine
    from .engine.request import Limits, Request, TokenLogprob
    from .engine.step import Step
    from .engine.tree import Tree
    from .errors import SelfdraftError
    from .integrations.transformers import hook
    from .llm import LLM, Stream, load
    from .params import Chunk, Completion, SamplingParams
    from .sampling.sampler import Sampler

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "Conversation",
    "DraftContext",
    "Drafter",
    "Engine",
    "Limits",
    "Method",
    "Request",
    "Sampler",
    "SamplingParams",
    "SelfdraftError",
    "Step",
    "Stream",
    "TokenLogprob",
    "Tree",
    "hook",
    "load",
]

_HOME = {
    "conversation": ("Conversation",),
    "drafting.method": ("Drafter", "Method", "DraftContext"),
    "engine.engine": ("Engine",),
    "engine.request": ("Limits", "Request", "TokenLogprob"),
    "engine.step": ("Step",),
    "engine.tree": ("Tree",),
    "errors": ("SelfdraftError",),
    "integrations.transformers": ("hook",),
    "llm": ("Stream", "LLM", "load"),
    "params": ("Chunk", "SamplingParams", "Completion"),
    "sampling.sampler": ("Sampler",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
