"""llama.cpp, through llama-cpp-python: `Llama.generate`, greedy, with its prompt lookup or without.

Keys and values are kept in the dtype of the other arms. The context is reset for each answer, so that every
prompt is read anew. A step is one call of `Llama.eval`. Everything that is not set here has the package's
default.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def versions() -> dict[str, str]:
    """Versions of the packages, and the instruction sets that the library uses."""
    library = importlib.import_module("llama_cpp")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("llama-cpp-python", "gguf", "numpy")},
        "system": library.llama_print_system_info().decode(),
    }


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        library = importlib.import_module("llama_cpp")
        kind = int(importlib.import_module("gguf").GGMLQuantizationType[KINDS[settings["dtype"]]])
        drafted: dict[str, Any] = {}
        if settings["lookup"]:
            speculative = importlib.import_module("llama_cpp.llama_speculative")
            lookup = speculative.LlamaPromptLookupDecoding(num_pred_tokens=settings["lookup"])
            drafted = {"draft_model": lookup, "logits_all": True}
        self.llama = library.Llama(
            settings["model"],
            n_ctx=settings["context"],
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            type_k=kind,
            type_v=kind,
            verbose=False,
            **drafted,
        )
        self.rows = 0
        self.eval, self.llama.eval = self.llama.eval, self._eval

    def _eval(self, tokens: Sequence[int]) -> None:
        self.rows += len(tokens)
        self.eval(tokens)

    def steps(self, prompt: list[int], length: int, eos: list[int]) -> Iterator[tuple[list[int], int]]:
        """Token by token. The tokens of a step come one after another, the first with the step's rows."""
        self.rows = 0
        self.llama.reset()
        for token in self.llama.generate(prompt, temp=0.0):
            rows, self.rows = self.rows, 0
            yield [token], rows
