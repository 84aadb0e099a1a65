"""Arms: what answers a prompt. Methods of this package, and Hugging Face's `generate` as the baseline.

All are timed by one rule and counted by one counter. An answer's clock starts when the token ids of the
prompt are handed over, drafting from references included, and notes the end of every step. A step is
what emits tokens: a decode forward here; in `generate` a round of its loop, whose first one reads the
prompt too. Tokens are ids, up to and including the one that ends the text.

`generate` runs a copy of the weights of its own with transformers' default attention, its cache, and a
generation config that asks for what the others are asked for. At a temperature it draws its own noise:
then its text is expected to differ.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .. import drafting
from ..drafting.method import Method
from ..engine.engine import Engine
from ..engine.request import Limits, first_end
from ..errors import InvalidOption
from ..llm import LLM
from ..models.transformers import TransformersModel
from ..sampling.sampler import Sampler

PLAIN = "plain"  # the method that the others are compared with
GENERATE = "generate"  # the baseline they are compared with
LOOKUP = re.compile(r"lookup-([1-9]\d*)")
PEERS = {  # engines of their own, each with its word for prompt lookup
    "llamacpp": re.compile(r"llamacpp(?:-lookup-([1-9]\d*))?"),
    "vllm": re.compile(r"vllm(?:-ngram-([1-9]\d*))?"),
}


@dataclass(frozen=True)
class Answer:
    """One answer, step by step. ids: the tokens. runs: tokens of each step. rows: rows it ran, those of
    the prompt apart. times: seconds from the request to each step's end. part: of a forward through the whole
    depth that a step is; a stage of a looped model is less than one. Where another process answers: peak,
    most bytes it held, and spent, processor seconds it took."""

    ids: Sequence[int]
    runs: Sequence[int]
    rows: Sequence[int]
    times: Sequence[float]
    part: float = 1.0
    peak: int | None = None
    spent: float = 0.0


class Arm(Protocol):
    """One way to answer. drafts: is it a method of this package? grade: whose text it is, the base's or
    that of tuned weights. plain: the arm that decodes the same weights plainly, which it is compared with.
    tuning_cost: what tuning those weights cost, as its training measured it (`train.tuning_cost`), if known.
    identity_expected: has its text to be that of `plain`, token by token?"""

    @property
    def name(self) -> str: ...
    @property
    def drafts(self) -> bool: ...
    @property
    def grade(self) -> str: ...
    @property
    def plain(self) -> str: ...
    @property
    def tuning_cost(self) -> Mapping[str, Any] | None: ...
    @property
    def identity_expected(self) -> bool: ...
    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        """At most `length` tokens that continue the prompt, of which some may stand in the references."""

    def close(self) -> None:
        """End what it started, if anything; a later answer starts it again."""


@dataclass(frozen=True)
class Drafted:
    """A method of this package on the engine's loop."""

    name: str
    method: Method
    model: TransformersModel
    sampler: Sampler
    eos: frozenset[int]
    plain: str = PLAIN
    drafts: bool = True
    identity_expected: bool = True

    @property
    def grade(self) -> str:
        return self.model.grade

    @property
    def tuning_cost(self) -> Mapping[str, Any] | None:
        return self.model.tuning_cost

    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        times: list[float] = []
        rows = [0]
        started = time.perf_counter()
        engine = Engine(self.model)
        request = engine.submit(prompt, self.method, self.sampler, Limits(length, self.eos), references)
        while request.finish_reason is None:
            engine.step()
            if len(request.runs) > len(times):  # else it read a part of the prompt
                times.append(time.perf_counter() - started)
                rows.append(request.rows)
        rows = [b - a for a, b in pairwise(rows)]
        part = request.forwards / len(request.runs)
        return Answer(list(request.emitted), list(request.runs), rows, times, part)

    def close(self) -> None:
        pass


@dataclass
class Rounds:
    """Notes the rounds of `generate`: their time and length by its stopping criteria, rows by a hook.

    A stopping criterion is called once a round with all ids so far. It must not cost: two numbers noted.
    """

    device: torch.device
    times: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self.lengths.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool, device=self.device)

    def hook(self, module: object, args: Sequence[Tensor], given: Mapping[str, Any]) -> None:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        self.rows.append(ids.shape[1])


@dataclass(frozen=True)
class Generated:
    """`generate` of transformers, with its cache. lookup: tokens of prompt lookup, 0 for none."""

    name: str
    model: PreTrainedModel
    sampler: Sampler
    eos: frozenset[int]
    lookup: int = 0
    drafts: bool = False
    grade: str = "base"
    plain: str = PLAIN
    tuning_cost: Mapping[str, Any] | None = None

    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        rounds = Rounds(self.model.device)
        config = self._config(length)
        handle = self.model.register_forward_pre_hook(rounds.hook, with_kwargs=True)
        torch.manual_seed(self.sampler.seed)
        try:
            started = time.perf_counter()
            ids = torch.tensor([list(prompt)], device=self.model.device)
            mask = torch.ones_like(ids)
            with torch.inference_mode():
                out = self.model.generate(  # type: ignore[operator]
                    ids, attention_mask=mask, generation_config=config, stopping_criteria=[rounds]
                )
        finally:
            handle.remove()
        return _trace(out[0].tolist(), len(prompt), rounds, started, self.eos)

    @property
    def identity_expected(self) -> bool:
        """At a temperature its noise is its own, and 16-bit types round differently for other numbers of
        rows, which it has."""
        return self.sampler.temperature == 0 and self.model.dtype in (torch.float32, torch.float64)

    def close(self) -> None:
        pass

    def _config(self, length: int) -> GenerationConfig:
        """Greedy, or sampled without any cut. It stands for the model's own, which may say more."""
        asked: dict[str, Any] = {"do_sample": False}
        if self.sampler.temperature > 0:
            asked = {"do_sample": True, "temperature": self.sampler.temperature, "top_k": 0, "top_p": 1.0}
        if self.lookup:
            asked["prompt_lookup_num_tokens"] = self.lookup
        ends = sorted(self.eos) or None
        self.model.generation_config = GenerationConfig()
        return GenerationConfig(
            max_new_tokens=length,
            eos_token_id=ends,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            **asked,
        )


def _trace(text: Sequence[int], start: int, rounds: Rounds, started: float, eos: frozenset[int]) -> Answer:
    """What `generate` did, in the steps and tokens that all arms are counted by."""
    ids = list(text[start:])
    end = first_end(ids, eos)
    ids = ids[: len(ids) if end is None else end + 1]
    reached = [min(length - start, len(ids)) for length in rounds.lengths]
    runs = [b - a for a, b in pairwise([0, *reached])]
    rows = [rounds.rows[0] - start + 1, *rounds.rows[1:]]  # the first forward reads the prompt too
    assert sum(runs) == len(ids)
    assert len(rows) == len(runs)
    return Answer(ids, runs, rows, [at - started for at in rounds.times])


def drafted(names: Sequence[str], generator: LLM, sampler: Sampler) -> list[Arm]:
    """The methods asked for, plain decoding first, and plain decoding of the weights that an adapter tunes
    before what drafts with them. Raises UnknownMethod and InvalidOption."""
    wanted = [PLAIN, *(name for name in names if name != PLAIN)]
    _check_distinct(wanted)
    arms: dict[str, Arm] = {}
    for name in wanted:
        one = generator.using(*spelled(name))
        plain = PLAIN if one.model.base is generator.model else f"{PLAIN}:adapter={one.adapter}"
        if plain not in arms:
            same = one.using(PLAIN)
            arms[plain] = Drafted(plain, same.method, same.model, sampler, same.eos, plain)
        if name != plain:
            arms[name] = Drafted(name, one.method, one.model, sampler, one.eos, plain)
    return list(arms.values())


def spelled(name: str) -> tuple[str, dict[str, object], str | None]:
    """A method, its options and its adapter, as in `llma`, `llma:block=10,match=3`, `bita:adapter=DIR`."""
    label, _, rest = name.partition(":")
    options: dict[str, object] = {}
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidOption(f"--method takes NAME or NAME:OPTION=VALUE,...; got {name!r}")
        options[key.strip()] = value.strip()
    return label, options, cast(str | None, options.pop("adapter", None))


def method(name: str) -> Method:
    """The method of such a name. Raises UnknownMethod and InvalidOption."""
    label, options, _ = spelled(name)
    return drafting.create(label, options)


def lookups(names: Sequence[str]) -> dict[str, int]:
    """Baselines of transformers by name -> tokens of prompt lookup; peers are left out. Raises InvalidOption
    for a name that is none of both."""
    found = {}
    _check_distinct(names)
    others = peers(names)
    for name in (name for name in names if name not in others):
        match = LOOKUP.fullmatch(name)
        if name != GENERATE and match is None:
            raise InvalidOption(
                f"no baseline {name!r}; there are {GENERATE} (Hugging Face, cached) and lookup-5, lookup-10, "
                "lookup-20 (the same with prompt lookup of so many tokens), llamacpp, llamacpp-lookup-10, "
                "vllm, vllm-ngram-10 (other engines, without and with theirs); plain always runs"
            )
        found[name] = int(match[1]) if match else 0
    return found


def peers(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Those of the baselines that other engines answer -> the engine, and its tokens of lookup or 0."""
    found = {}
    for name in names:
        for engine, spelling in PEERS.items():
            if match := spelling.fullmatch(name):
                found[name] = engine, int(match[1] or 0)
    return found


def _check_distinct(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidOption(f"{twice[0]!r} is given twice; each method and baseline is measured once")
