"""A job: what was asked for, made into arms, prompts and a journal; and the machine it runs on."""

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
from ..llm import LLM, load
from ..models.loading import load_pretrained
from ..models.transformers import Numerics
from ..sampling.sampler import Sampler
from . import bound, peer
from .arm import Arm, Drafted, Generated, drafted, lookups, method, peers
from .journal import Journal
from .measure import Bench, Work, plan
from .source import Source


@dataclass(frozen=True)
class Job:
    """What is asked for. methods: names, with options as in `llma:block=10`; plain is always measured.
    baselines: see `arm.lookups` and `arm.peers`. peer_python: the interpreter of a peer's engine, where it is
    not this one. prompts: of each suite, at most. repeats: answers to each prompt.
    max_new_tokens: None is the suite's own. Raises InvalidOption and UnknownMethod."""

    model: str = "pico"
    methods: Sequence[str] = ("llma",)
    baselines: Sequence[str] = ("generate",)
    peer_python: Mapping[str, str] = field(default_factory=dict)
    prompts: int = 100
    repeats: int = 3
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    numerics: Numerics | None = None

    def __post_init__(self) -> None:
        counts = {"prompts": self.prompts, "repeats": self.repeats, "max_new_tokens": self.max_new_tokens}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InvalidOption(f"{name} must be at least 1; got {count}")
        for name in self.methods:
            method(name)
        lookups(self.baselines)
        peer.check_asked(peers(self.baselines), self.peer_python, self.temperature)

    def prepare(self, sources: Sequence[Source], out: Path | None = None) -> Bench:
        """The bench, ready to run; out: its folder, by default named after what is run."""
        sampler = Sampler(self.temperature, seed=self.seed)
        generator = load(self.model, dtype=self.dtype, device=self.device, numerics=self.numerics)
        others = peers(self.baselines)
        peer.check_model(others, self.model, generator)
        versions = peer.versions(others, self.peer_python)
        arms = [*drafted(self.methods, generator, sampler), *self._generated(generator, sampler)]
        works = [plan(source, generator, self.prompts, self.max_new_tokens) for source in sources]
        run = self._run(generator, arms, works) | ({"peers": versions} if versions else {})
        journal = Journal(out or Path(f"bench-{_digest(run)[:8]}"), run)
        context = max((work.context for work in works), default=0)
        arms += peer.arms(others, self.peer_python, self.model, generator, context, journal.folder)
        return Bench(generator, arms, works, self.repeats, journal)

    def _generated(self, generator: LLM, sampler: Sampler) -> list[Arm]:
        """The baselines, on one copy of the weights of their own."""
        wanted = lookups(self.baselines)
        if not wanted:
            return []
        model = load_pretrained(self.model, self.dtype, self.device)[0].eval()
        grade = generator.model.grade
        return [
            Generated(name, model, sampler, generator.eos, tokens, grade=grade)
            for name, tokens in wanted.items()
        ]

    def _run(self, generator: LLM, arms: Sequence[Arm], works: Sequence[Work]) -> dict[str, Any]:
        """All that figures depend on: no folder made with anything else is continued."""
        model = generator.model
        return {
            "model": generator.name,
            "weights": machine.weights_sha256(model.model),
            "dtype": str(model.dtype).removeprefix("torch."),
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
                arm.name: machine.weights_sha256(arm.model.base.model)
                for arm in arms
                if isinstance(arm, Drafted) and arm.model.base is not model
            },
            "repeats": self.repeats,
            "suites": {work.name: _asked(work) for work in works},
            "machine": machine.describe(model.device),
        }


def circumstances(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the figures come about; and what the machine can do at best. Takes some seconds."""
    model = bench.generator.model
    provenance = {
        "argv": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "idle_cores_busy": machine.idle_load(),
        "seeds": {"noise": bench.journal.run["seed"], "bootstrap": 0},
        "parameters": model.model.num_parameters(),
        "rows_per_call": [model.rows.least, model.rows.most],
        "answers_found": bench.journal.found,
    }
    best = {
        "bandwidth": bound.bandwidth(model.device),
        "weight_bytes": bound.weight_bytes(model),
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
