"""A job: turns the options of a run into arms, prompts and a journal, and describes the machine."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._common import machine
from ..errors import InvalidOption
from ..llm import LLM
from ..models.loading import DEFAULT_MODEL, load_pretrained
from ..models.transformers import Numerics
from ..params import SamplingParams
from . import bound, peer
from .arm import PLAIN, Arm, Drafted, Generated, drafted, externals, lookups, method
from .journal import Journal
from .measure import Bench, Work, plan
from .source import Source
from .stored import gguf_source, stored_format


@dataclass(frozen=True)
class Job:
    """The options of a run. Raises InvalidOption and UnknownMethod."""

    model: str = DEFAULT_MODEL
    methods: Sequence[str] = ("auto",)
    """Names, with options as in `llma:block=10`; plain decoding is always measured."""
    baselines: Sequence[str] = ("generate",)
    """See `arm.lookups` and `arm.externals`."""
    peer_python: Mapping[str, str] = field(default_factory=dict)
    """Engine -> the interpreter that has it, if it is not this one."""
    raw: bool = False
    """Ask without the model's chat template."""
    prompts: int = 100
    """Prompts of each suite, at most."""
    repeats: int = 3
    """Answers to each prompt."""
    max_new_tokens: int | None = None
    """Length of answers; None is the suite's."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None is what the model's context allows."""
    temperature: float = 0.0
    seed: int = 0
    weights: str | None = None
    """Format in which the weights run; see `LLM`."""
    activations: int | None = None
    """Bits of the inputs of products with quantised weights; see `LLM`."""
    dtype: str | None = None
    device: str | None = None
    numerics: Numerics | None = None

    def __post_init__(self) -> None:
        names = ("prompts", "repeats", "max_new_tokens", "max_prompt_tokens")
        counts = {name: getattr(self, name) for name in names}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InvalidOption(f"{name} must be at least 1; got {count}")
        for name in self.methods:
            method(name)
        lookups(self.baselines)
        peer.check_asked(externals(self.baselines), self.peer_python, self.temperature)

    def prepare(self, sources: Sequence[Source], out: Path | None = None) -> Bench:
        """The bench, ready to run. out: its folder; the default is named after a hash of the settings."""
        params = SamplingParams(temperature=self.temperature, seed=self.seed)
        llm = LLM(
            self.model,
            PLAIN,
            weights=self.weights,
            activations=self.activations,
            dtype=self.dtype,
            device=self.device,
            numerics=self.numerics,
        )
        others = externals(self.baselines)
        peer.check_model(others, self.model, llm)
        versions = peer.versions(others, self.peer_python)
        arms = [*drafted(self.methods, llm, params), *self._generated(llm, params)]
        chat = llm.chats(raw=self.raw)
        limits = self.max_new_tokens, chat, self.max_prompt_tokens
        works = [plan(source, llm, self.prompts, *limits) for source in sources]
        run = self._run(llm, arms, works, chat) | ({"peers": versions} if versions else {})
        journal = Journal(out or Path(f"bench-{_digest(run)[:8]}"), run)
        context = max((work.context for work in works), default=0)
        arms += peer.arms(others, self.peer_python, self.model, llm, context, journal.folder)
        return Bench(llm, arms, works, self.repeats, journal, chat)

    def _generated(self, llm: LLM, params: SamplingParams) -> list[Arm]:
        """The baselines of transformers, on their own copy of the weights."""
        wanted = lookups(self.baselines)
        if not wanted:
            return []
        model = load_pretrained(self.model, self.dtype, self.device)[0].eval()
        grade = llm.model.grade
        return [
            Generated(name, model, params, llm.eos_ids, tokens, grade=grade)
            for name, tokens in wanted.items()
        ]

    def _run(self, llm: LLM, arms: Sequence[Arm], works: Sequence[Work], chat: bool) -> dict[str, Any]:
        """Everything that figures depend on. A folder made with other settings is not continued."""
        model = llm.model
        source = gguf_source(self.model)
        return {
            "model": llm.name,
            "weights": model.weights_sha256(),
            "stored": None if source is None else stored_format(source),
            "format": model.weights_label,
            "dtype": str(model.dtype).removeprefix("torch."),
            "chat": chat,
            "numerics": model.numerics,
            "temperature": self.temperature,
            "seed": self.seed,
            "methods": [arm.name for arm in arms if arm.drafts],
            "baselines": list(self.baselines),
            "adapters": {
                arm.name: machine.module_sha256(repr(arm.model.adapter.config), arm.model.adapter)
                for arm in arms
                if isinstance(arm, Drafted) and arm.model.adapter is not None
            },
            "tuned": {
                arm.name: arm.model.base.weights_sha256()
                for arm in arms
                if isinstance(arm, Drafted) and arm.model.base is not model
            },
            "repeats": self.repeats,
            "suites": {work.name: _asked(work) for work in works},
            "machine": machine.describe(model.device),
        }


def circumstances(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """The circumstances of the run, and the limits of the machine. Takes some seconds to measure."""
    model = bench.llm.model
    provenance = {
        "argv": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "idle_cores_busy": machine.idle_load(),
        "seeds": {"noise": bench.journal.run["seed"], "bootstrap": 0},
        "parameters": model.parameters,
        "rows_per_call": [model.rows.least, model.rows.most],
        "answers_found": bench.journal.found,
    }
    best = {
        "bandwidth": bound.bandwidth(model.device),
        "weight_bytes": model.weight_bytes,
        "rows": bound.row_costs(model),
    }
    return provenance, best


def _asked(work: Work) -> Mapping[str, object]:
    return {
        "prompts": len(work.items),
        "max_new_tokens": work.length,
        "data": work.source.fingerprints,
        "texts": _digest([[item.id, item.turns, item.references] for item in work.items]),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
