"""Whatever a request asks for, whoever else is in the engine: its text is plain decoding's, alone."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from selfdraft import Engine, Method, Request, SamplingParams
from selfdraft.drafting import create
from selfdraft.engine.scheduler import Limits
from selfdraft.models.decoder import Decoder
from selfdraft.models.paged_cache import PagePool
from selfdraft.models.protocol import Model
from selfdraft.models.transformers import TransformersModel
from selfdraft.sampling.sampler import Sampler
from selfdraft.sampling.stopping import StopStrings, StringWatch
from selfdraft.verify.adversaries import Garbage, Oracle

from faults import Patch, penalties
from runs import random_prompt
from test_decoder import decoder

REQUESTS = os.environ.get("SELFDRAFT_REQUESTS")
"""How many to generate in bfloat16, and how many in float64; unset: 400 and 120."""
SEED = int(os.environ.get("SELFDRAFT_SEED", "0"))
"""Of what is generated."""
MEAN = 3.5  # requests of a crowd, on average at least
EXAMPLES = 30  # crowds where a fault must be seen
CROWDS: list[tuple[int, int]] = []
"""Requests and preemptions of each that was run."""
SEEN = 2  # times as many until a fault must be seen; what is drawn depends on all modules that are loaded


@dataclass(frozen=True)
class Asked:
    """One request: when it joins, and when it is cancelled, in steps of the engine."""

    prompt: Sequence[int]
    references: Sequence[Sequence[int]]
    method: str
    params: Mapping[str, Any]
    sample: int
    joins: int
    leaves: int | None
    n: int
    """Samples of it."""

    def submit(self, engine: Engine, method: Method, tokenizer: PreTrainedTokenizerFast) -> Request:
        params = SamplingParams(**self.params)
        stop = StopStrings(tokenizer, params.stop_strings) if params.stop_strings else None
        return engine.submit(self.prompt, method, params, self.references, stop=stop, sample=self.sample)


def some(always: Collection[str] = (), **kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these options, and always those that are named."""
    given = {name: kinds.pop(name) for name in always}
    return st.fixed_dictionaries(given, optional=kinds)


METHODS = ("plain", "llma", "auto", "jacobi", "garbage", *["oracle"] * 4)  # whose drafts are taken


def asked(always: Collection[str] = (), methods: Sequence[str] = METHODS) -> st.SearchStrategy[Asked]:
    """A request of random parameters; always: those that it has in any case."""
    ids = st.integers(0, 319)
    params = some(
        always,
        temperature=st.sampled_from([0.3, 0.8, 1.5]),
        top_k=st.integers(1, 60),
        top_p=st.floats(0.3, 1.0),
        min_p=st.floats(0.0, 0.3),
        repetition_penalty=st.floats(0.6, 1.8),
        presence_penalty=st.floats(-1.0, 2.0),
        frequency_penalty=st.floats(-0.5, 1.0),
        logit_bias=st.dictionaries(ids, st.floats(-5, 8), max_size=5),
        seed=st.integers(0, 2**64 - 1),
        max_new_tokens=st.integers(12, 40),
        min_new_tokens=st.integers(0, 12),
        eos=st.builds(
            lambda first, many: tuple(range(first, min(320, first + many))), ids, st.integers(1, 60)
        ),
        logprobs=st.none() | st.integers(0, 3),
        stop=st.lists(st.sampled_from(["a", "e", "re", "\n", "t", "(", "zz"]), min_size=1).map(tuple),
    )
    text = st.builds(random_prompt, st.integers(1, 50), st.integers(0, 9))
    return st.builds(
        Asked,
        prompt=text,
        references=st.lists(text, max_size=2),
        method=st.sampled_from(methods),
        params=params.map(lambda given: {"max_new_tokens": 24, "logprobs": 1, "seed": 0, **given}),
        sample=st.integers(0, 9),
        joins=st.integers(0, 25),
        leaves=st.none() | st.none() | st.integers(0, 30),
        n=st.sampled_from([1, 1, 1, 2, 3]),
    )


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost nothing, whatever this machine is busy with: the same drafts each time, and large ones."""
    for kind in (TransformersModel, Decoder):
        monkeypatch.setattr(kind, "cost", lambda self, rows, history=0: 1.0)


def alone(model: Model, one: Asked, tokenizer: PreTrainedTokenizerFast) -> Request:
    engine = Engine(model)
    request = one.submit(engine, create("plain"), tokenizer)
    for _ in engine.run(request):
        pass
    return request


def drafting(one: Asked, right: Request) -> Method:
    """Its method; the oracle knows plain's text, so that drafts are taken."""
    known: dict[str, Method] = {"garbage": Garbage(), "oracle": Oracle(right.emitted)}
    return known[one.method] if one.method in known else create(one.method)


def together(
    model: Model,
    crowd: Sequence[Asked],
    rights: Sequence[Request],
    tokenizer: PreTrainedTokenizerFast,
    limits: Limits,
) -> list[Request]:
    engine, joined, steps = Engine(model, limits), dict[int, Request](), 0
    while len(joined) < len(crowd) or engine.requests:
        for i, one in enumerate(crowd):
            if i not in joined and one.joins <= steps:
                joined[i] = one.submit(engine, drafting(one, rights[i]), tokenizer)
            if i in joined and one.leaves is not None and one.leaves + one.joins == steps:
                engine.cancel(joined[i])
        engine.step()
        steps += 1
    CROWDS.append((len(crowd), engine.scheduler.preemptions))
    assert engine.pool.free == engine.pool.tokens, "all memory comes back"
    return [joined[i] for i in range(len(crowd))]


def compare(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    examples: int = EXAMPLES,
    always: Collection[str] = (),
    methods: Sequence[str] = METHODS,
    limits: Limits | None = None,
) -> None:
    """Crowds of requests against each one alone; stops at the first difference."""

    @seed(SEED)
    @given(st.lists(asked(always, methods), min_size=1, max_size=7))
    @hypothesis_settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(several: list[Asked]) -> None:
        crowd = [replace(one, sample=one.sample + i) for one in several for i in range(one.n)]
        rights = [alone(model, one, tokenizer) for one in crowd]
        requests = together(model, crowd, rights, tokenizer, limits or Limits())
        for right, request in zip(rights, requests, strict=True):
            count = len(request.emitted)
            assert request.emitted == right.emitted[:count]
            if request.params.logprobs is not None:
                assert [p.token for p in request.logprobs] == list(request.emitted)
            for ours, theirs in zip(request.logprobs, right.logprobs, strict=False):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
            if request.finish_reason != "cancelled":
                assert (count, request.finish_reason) == (len(right.emitted), right.finish_reason)
                assert (request.watch and request.watch.cut) == (right.watch and right.watch.cut)

    check()


def crowds(requests: int) -> int:
    """How many crowds make so many requests, or as many as are asked for."""
    return math.ceil(int(REQUESTS or requests) / MEAN)


def test_requests_do_not_depend_on_method_or_company(
    double: TransformersModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    CROWDS.clear()
    compare(double, tokenizer, crowds(120))
    assert sum(requests for requests, _ in CROWDS) >= int(REQUESTS or 120)


def page_bytes(model: Decoder) -> int:
    pool = model.pool()
    return pool.keys.nbytes // pool.capacity * 2


def test_requests_do_not_depend_on_memory_that_is_short(tokenizer: PreTrainedTokenizerFast) -> None:
    """In bfloat16, on pages that hold two or three of them, few rows to a step."""
    model = decoder("BF16", run_as="bf16", vocab_size=320, max_position_embeddings=256)
    CROWDS.clear()
    limits = Limits(kv_memory=6 * page_bytes(model), max_rows=24, max_requests=5)
    compare(model, tokenizer, crowds(400), limits=limits)
    assert sum(requests for requests, _ in CROWDS) >= int(REQUESTS or 400)
    assert sum(preemptions for _, preemptions in CROWDS) >= 5, "requests gave their memory back and went on"


def forgets_to_read(patch: pytest.MonkeyPatch) -> None:
    """After a preemption a request goes on as if its prompt were all its text."""
    open_ = Request.open

    def wrong(self: Request, pool: Any) -> None:
        open_(self, pool)
        if self.runs and self.cache is not None:
            self.cache.pretend(len(self.tokens) - 1)  # type: ignore[attr-defined]

    patch.setattr(Request, "open", wrong)


def keeps_what_it_gave_back(patch: pytest.MonkeyPatch) -> None:
    """A page that is taken from the idle ones is still found by its old text."""
    patch.setattr(PagePool, "_forget", lambda self, page: None)


@pytest.mark.parametrize("fault", [forgets_to_read, keeps_what_it_gave_back])
def test_a_fault_of_the_memory_is_seen(
    fault: Patch, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder("BF16", run_as="bf16", vocab_size=320, max_position_embeddings=256)
    limits = Limits(kv_memory=6 * page_bytes(model), max_rows=24, max_requests=5)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        compare(model, tokenizer, 60, limits=limits)


def stop_late(patch: pytest.MonkeyPatch) -> None:
    """Stop strings are looked for once a step, behind all its tokens."""
    find = StringWatch.find

    def late(self: StringWatch, tokens: Sequence[int], least: int) -> int | None:
        found = [find(self, [token], least - i) for i, token in enumerate(tokens)]
        return len(tokens) - 1 if any(index is not None for index in found) else None

    patch.setattr(StringWatch, "find", late)


def early_ends(patch: pytest.MonkeyPatch) -> None:
    """The ban on early ends goes by the step, not by each row's position."""
    scores = Sampler.scores

    def coarse(self: Sampler, logits: Tensor, tails: Sequence[Sequence[int]]) -> Tensor:
        start, self.start = self.start, 10**9 if self.length < self.start else 0
        try:
            return scores(self, logits, tails)
        finally:
            self.start = start

    patch.setattr(Sampler, "scores", coarse)


@pytest.mark.parametrize(
    ("fault", "always"),
    [
        (stop_late, ["stop"]),
        (early_ends, ["eos", "min_new_tokens"]),
        (penalties, ["frequency_penalty", "repetition_penalty"]),
    ],
)
def test_a_fault_is_seen(
    fault: Patch,
    always: Sequence[str],
    double: TransformersModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        compare(double, tokenizer, SEEN * EXAMPLES, always, ["oracle"])  # its drafts are taken
