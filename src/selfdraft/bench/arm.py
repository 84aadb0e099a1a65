"""Arms: what answers a prompt. Methods of this package, and Hugging Face's `generate` as the baseline.

All arms are timed and counted alike. The clock starts when the arm receives the prompt's token ids, so that
reading references counts, and the end of every step is noted. A step is what emits tokens: a decoding forward
here; in `generate` a round of its loop, the first of which reads the prompt too. Tokens are ids, up to and
including the one that ends the text.

`generate` runs its own copy of the weights with transformers' default attention, its cache, and a generation
config with the settings of the other arms. At a temperature it draws its own noise, so its text differs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .. import drafting
from ..drafting.acceptance import DraftCount, SharedAcceptance
from ..drafting.method import Method
from ..engine.engine import Engine
from ..engine.request import first_end
from ..errors import InvalidOption
from ..llm import LLM
from ..models.loading import AnyModel
from ..params import SamplingParams

PLAIN = "plain"
"""The method that all others are compared with."""
GENERATE = "generate"
"""The baseline that all others are compared with."""
LOOKUP = re.compile(r"lookup-([1-9]\d*)")
ENGINES = {
    "llamacpp": re.compile(r"llamacpp(?P<stored>-stored)?(?:-lookup-(?P<lookup>[1-9]\d*))?"),
    "llama_server": re.compile(
        r"llama-server(?P<stored>-stored)?"
        r"(?:-(?P<ngram>ngram-(?:simple|map-k|map-k4v|mod|cache)(?::[a-z-]+=\d+(?:,[a-z-]+=\d+)*)?))?"
    ),
    "vllm": re.compile(r"vllm(?:-ngram-(?P<lookup>[1-9]\d*))?"),
}
"""Other inference engines -> how their baselines are spelled."""


@dataclass(frozen=True)
class Answer:
    """One answer, step by step."""

    ids: Sequence[int]
    """The answer's tokens."""
    runs: Sequence[int]
    """Tokens that each step emitted."""
    rows: Sequence[int]
    """Rows that each step ran, without those of the prompt."""
    times: Sequence[float]
    """Seconds from the request to the end of each step."""
    part: float = 1.0
    """Share of the whole depth that a step runs; less than 1 for a stage of a looped model."""
    peak: int | None = None
    """Peak memory in bytes, if another process answered."""
    spent: float = 0.0
    """Processor seconds, if another process answered."""
    sources: Mapping[str, DraftCount] = field(default_factory=dict)
    """Draft tokens by where they are from, of methods that say so."""
    readouts: Mapping[str, DraftCount] = field(default_factory=dict)
    """Picks of a looped model's early passes, by pass: how many, and how many were the final ones."""


class Arm(Protocol):
    """One way to answer prompts."""

    @property
    def name(self) -> str: ...
    @property
    def drafts(self) -> bool:
        """Is it a method of this package?"""

    @property
    def grade(self) -> str:
        """Whose text it reproduces: "base", or "tuned" for weights that an adapter has changed."""

    @property
    def plain(self) -> str:
        """The arm that decodes the same weights plainly, which this one is compared with."""

    @property
    def tuning_cost(self) -> Mapping[str, Any] | None:
        """What tuning the weights cost in quality, as measured by their training, if known."""

    @property
    def identity_expected(self) -> bool:
        """Must its text be that of `plain`, token by token?"""

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of weights that a forward reads, where they differ from the loaded model's."""

    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        """At most `length` tokens that continue the prompt. The answer may quote the references."""

    def close(self) -> None:
        """End what the arm started, if anything. A later answer starts it again."""


class External(NamedTuple):
    """A baseline that another inference engine runs."""

    engine: str
    lookup: int = 0
    """Draft tokens of its own prompt lookup, 0 for none."""
    stored: bool = False
    """Runs the GGUF file that the model was read from, instead of the loaded weights."""
    ngram: str = ""
    """One of its own n-gram drafters, with sizes: `ngram-simple:size-n=4,size-m=16`; empty: none."""


@dataclass(frozen=True)
class Drafted:
    """A method of this package on the engine's loop."""

    name: str
    method: Method
    model: AnyModel
    params: SamplingParams
    eos: frozenset[int]
    plain: str = PLAIN
    drafts: bool = True
    identity_expected: bool = True
    weight_bytes: int | None = None
    acceptance: SharedAcceptance = field(default_factory=SharedAcceptance)
    """What its answers have learned, as those of one engine would."""

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
        engine = Engine(self.model, acceptance=self.acceptance)
        params = replace(self.params, max_new_tokens=length)
        request = engine.submit(prompt, self.method, params, references, eos_ids=self.eos)
        while request.finish_reason is None:
            engine.step()
            if len(request.runs) > len(times):  # else it read a part of the prompt
                times.append(time.perf_counter() - started)
                rows.append(request.rows)
        rows = [b - a for a, b in pairwise(rows)]
        part = request.forwards / len(request.runs)
        return Answer(
            list(request.emitted),
            list(request.runs),
            rows,
            times,
            part,
            sources=request.sources,
            readouts=request.readouts,
        )

    def close(self) -> None:
        pass


@dataclass
class Rounds:
    """Records the rounds of `generate`: time and length with a stopping criterion, rows with a hook.

    A stopping criterion is called once a round with all ids so far; it must not slow the round.
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
    """`generate` of transformers, with its cache."""

    name: str
    model: PreTrainedModel
    params: SamplingParams
    eos: frozenset[int]
    lookup: int = 0
    """Draft tokens of its prompt lookup, 0 for none."""
    drafts: bool = False
    grade: str = "base"
    plain: str = PLAIN
    tuning_cost: Mapping[str, Any] | None = None
    weight_bytes: int | None = None

    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        rounds = Rounds(self.model.device)
        config = self._config(length)
        handle = self.model.register_forward_pre_hook(rounds.hook, with_kwargs=True)
        torch.manual_seed(self.params.seed or 0)
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
        """At a temperature its noise differs, and in 16 bits rounding depends on the number of rows."""
        return self.params.temperature == 0 and self.model.dtype in (torch.float32, torch.float64)

    def close(self) -> None:
        pass

    def _config(self, length: int) -> GenerationConfig:
        """Greedy, or sampled from the whole distribution. It replaces the model's own generation config."""
        asked: dict[str, Any] = {"do_sample": False}
        if self.params.temperature > 0:
            asked = {"do_sample": True, "temperature": self.params.temperature, "top_k": 0, "top_p": 1.0}
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
    """The answer of `generate`, counted like those of all arms."""
    ids = list(text[start:])
    end = first_end(ids, eos)
    ids = ids[: len(ids) if end is None else end + 1]
    reached = [min(length - start, len(ids)) for length in rounds.lengths]
    runs = [b - a for a, b in pairwise([0, *reached])]
    rows = [rounds.rows[0] - start + 1, *rounds.rows[1:]]  # the first forward reads the prompt too
    assert sum(runs) == len(ids)
    assert len(rows) == len(runs)
    return Answer(ids, runs, rows, [at - started for at in rounds.times])


def drafted(names: Sequence[str], llm: LLM, params: SamplingParams) -> list[Arm]:
    """Arms of the methods, plain decoding first. Plain decoding of weights that an adapter has tuned comes
    before the methods that draft with them. Raises UnknownMethod and InvalidOption."""
    wanted = [PLAIN, *(name for name in names if name != PLAIN)]
    _check_distinct(wanted)
    arms: dict[str, Arm] = {}
    for name in wanted:
        one = llm.using(*spelled(name))
        plain = PLAIN if one.model.base is llm.model else f"{PLAIN}:adapter={one.adapter}"
        if plain not in arms:
            same = one.using(PLAIN)
            arms[plain] = Drafted(plain, same.method, same.model, params, same.eos_ids, plain)
        if name != plain:
            arms[name] = Drafted(name, one.method, one.model, params, one.eos_ids, plain)
    return list(arms.values())


def spelled(name: str) -> tuple[str, dict[str, object], str | None]:
    """Read a method, its options and its adapter: `llma`, `llma:block=10,match=3`, `bita:adapter=DIR`."""
    label, _, rest = name.partition(":")
    options: dict[str, object] = {}
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidOption(f"--method takes NAME or NAME:OPTION=VALUE,...; got {name!r}")
        options[key.strip()] = value.strip()
    return label, options, cast(str | None, options.pop("adapter", None))


def method(name: str) -> Method:
    """The method that a name with options stands for. Raises UnknownMethod and InvalidOption."""
    label, options, _ = spelled(name)
    return drafting.create(label, options)


def lookups(names: Sequence[str]) -> dict[str, int]:
    """Baselines of transformers -> draft tokens of prompt lookup. Those of other engines are left out.

    Raises InvalidOption for a name that is no baseline.
    """
    found = {}
    _check_distinct(names)
    others = externals(names)
    for name in (name for name in names if name not in others):
        match = LOOKUP.fullmatch(name)
        if name != GENERATE and match is None:
            raise InvalidOption(
                f"no baseline {name!r}; there are {GENERATE} (Hugging Face, cached), lookup-10 (the same "
                "with prompt lookup of 10 tokens, or of another number), llamacpp, llamacpp-lookup-10, "
                "llamacpp-stored, llamacpp-stored-lookup-10, llama-server, llama-server-ngram-simple (or "
                "-map-k, -map-k4v, -mod, -cache; with sizes: llama-server-ngram-simple:size-n=4,size-m=16), "
                "llama-server-stored, vllm, vllm-ngram-10; plain always runs"
            )
        found[name] = int(match[1]) if match else 0
    return found


def externals(names: Sequence[str]) -> dict[str, External]:
    """Those of the baselines that other inference engines run."""
    found = {}
    for name in names:
        for engine, spelling in ENGINES.items():
            if match := spelling.fullmatch(name):
                given = match.groupdict()
                lookup, ngram = int(given.get("lookup") or 0), given.get("ngram") or ""
                found[name] = External(engine, lookup, given.get("stored") is not None, ngram)
    return found


def _check_distinct(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidOption(f"{twice[0]!r} is given twice; each method and baseline is measured once")
