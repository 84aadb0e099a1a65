"""selfdraft: several tokens per forward pass from one model, and the same text.

    import selfdraft

    llm = selfdraft.LLM("smollm2")
    print(llm.generate("Why is the sky blue?").text)

Names are imported when first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .conversation import Conversation
    from .drafting.method import DraftContext, Drafter, Method
    from .engine.engine import Engine
    from .engine.request import Request, TokenLogprob
    from .engine.scheduler import Limits
    from .engine.step import Step
    from .engine.tree import Tree
    from .errors import SelfdraftError
    from .integrations.transformers import hook
    from .llm import LLM, Stream
    from .outputs import Chunk, Completion
    from .params import SamplingParams

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Chunk",
    "Completion",
    "Conversation",
    "DraftContext",
    "Drafter",
    "Engine",
    "Limits",
    "Method",
    "Request",
    "SamplingParams",
    "SelfdraftError",
    "Step",
    "Stream",
    "TokenLogprob",
    "Tree",
    "hook",
]

_HOME = {
    "async_llm": ("AsyncLLM",),
    "conversation": ("Conversation",),
    "drafting.method": ("Drafter", "Method", "DraftContext"),
    "engine.engine": ("Engine",),
    "engine.request": ("Request", "TokenLogprob"),
    "engine.scheduler": ("Limits",),
    "engine.step": ("Step",),
    "engine.tree": ("Tree",),
    "errors": ("SelfdraftError",),
    "integrations.transformers": ("hook",),
    "llm": ("LLM", "Stream"),
    "outputs": ("Chunk", "Completion"),
    "params": ("SamplingParams",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
