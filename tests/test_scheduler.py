"""Who runs: memory, rows, chunks of prompts beside decoding requests, the prefix cache. No text depends on
it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from selfdraft import Engine, Method, Request, SamplingParams, Tree
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.plain import Plain
from selfdraft.engine import scheduler
from selfdraft.engine.scheduler import Limits, Scheduler
from selfdraft.errors import InvalidOption, KVMemoryExhausted, QueueFull
from selfdraft.models.decoder import Decoder
from selfdraft.models.paged_cache import PagedCache
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Garbage, Oracle

from runs import greedy, random_prompt, run, sampled
from test_decoder import decoder

PAGE = 16


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder("bf16", vocab_size=320)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row costs a tenth of a step."""
    monkeypatch.setattr(Decoder, "cost", lambda self, rows, history=0: 1 + rows / 10)


def pages(model: Decoder, count: int) -> int:
    """Bytes of so many pages."""
    pool = model.pool()
    return 2 * pool.keys.nbytes // pool.capacity * count


def finish(engine: Engine) -> None:
    while engine.requests:
        engine.step()


def emitted(model: Decoder, prompt: Sequence[int], params: SamplingParams) -> Sequence[int]:
    return run(model, Plain(), prompt, params).emitted


def test_a_prompt_is_read_beside_the_steps_of_others(model: Decoder) -> None:
    """In parts that make a step at most twice as long; whole where nobody decodes."""
    engine = Engine(model)
    first = engine.submit(random_prompt(40, 1), Plain(), greedy(60))
    engine.step()
    assert first.ready, "read at once: nobody waits for a step"
    late = engine.submit(random_prompt(400, 2), Plain(), greedy(5))
    had = len(first.tokens)
    engine.step()
    assert len(first.tokens) == had + 1
    assert 8 < late.length < 20, "a step of one row costs 1.1, one of 12 twice as much"
    finish(engine)
    assert first.emitted == emitted(model, first.prompt, greedy(60))
    assert late.emitted == emitted(model, late.prompt, greedy(5))


@pytest.mark.parametrize("limit", [3, 20])
def test_rows_of_a_step_keep_to_the_limit(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """However much is drafted, and while prompts are read beside it."""
    rows: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, trees: Any, *others: Any) -> Any:
        rows.append(sum(len(tree) for tree in trees))
        return forward(self, trees, *others)

    prompts = [random_prompt(30, i) for i in range(6)]
    rights = [emitted(model, prompt, greedy(20)) for prompt in prompts]
    monkeypatch.setattr(Decoder, "forward", counted)
    engine, requests = Engine(model, Limits(max_rows=limit)), []
    for i, (prompt, right) in enumerate(zip(prompts, rights, strict=True)):
        requests.append(engine.submit(prompt, Oracle(right, depth=3 + i), greedy(20)))
        engine.step()
    finish(engine)
    assert max(rows) == limit
    assert [request.emitted for request in requests] == rights


def test_what_two_prompts_share_is_read_once(model: Decoder) -> None:
    """Also where they come together, and by a prompt that ends inside it. Texts of another salt share
    nothing, nor do those that begin otherwise."""
    shared = random_prompt(100, 3)
    prompts = [[*shared, 5, 6, 7], [*shared, 8], shared, shared[:50]]
    prompts.append([*random_prompt(16, 4), *shared[16:]])
    engine = Engine(model)
    together = [engine.submit(prompt, Plain(), greedy(12)) for prompt in prompts]
    other = engine.submit(prompts[0], Plain(), greedy(12), salt="another")
    finish(engine)
    later = engine.submit([*prompts[0], *together[0].emitted, 9], Plain(), greedy(12))
    finish(engine)
    assert [request.reused for request in together] == [0, 96, 96, 48, 0]
    assert other.reused == 0
    assert later.reused == 112, "what was written, too"
    for request in (*together, other, later):
        assert request.emitted == emitted(model, request.prompt, greedy(12))


def test_the_least_recently_used_is_forgotten_first(model: Decoder) -> None:
    engine = Engine(model, Limits(kv_memory=pages(model, 8)))
    texts = [random_prompt(3 * PAGE + 1, i) for i in range(3)]

    def reused(which: int) -> int:
        request = engine.submit(texts[which], Plain(), greedy(1))
        finish(engine)
        return request.reused

    assert [reused(0), reused(1), reused(0)] == [0, 0, 48]
    assert [reused(2), reused(0), reused(2)] == [0, 48, 48]
    assert reused(1) < 48, "its pages, or the last of them, were taken for the third"


@pytest.mark.parametrize("method", [Plain(), Llma(), Jacobi(), Auto(), Garbage()])
def test_who_gives_its_memory_back_goes_on_as_if_it_had_not(model: Decoder, method: Method) -> None:
    engine = Engine(model, Limits(kv_memory=pages(model, 12)))
    prompts = [random_prompt(20, i) for i in range(5)]
    params = [sampled(0.8, seed=i, tokens=60) if i % 2 else greedy(60) for i in range(5)]
    requests = [engine.submit(*pair) for pair in zip(prompts, [method] * 5, params, strict=True)]
    finish(engine)
    assert engine.scheduler.preemptions > 0
    for request in requests:
        assert request.emitted == emitted(model, request.prompt, request.params)
    assert engine.pool.free == engine.pool.tokens


def test_a_text_that_outgrows_the_memory_ends_alone(model: Decoder) -> None:
    engine = Engine(model, Limits(kv_memory=pages(model, 6)))
    long = engine.submit(random_prompt(60, 1), Plain(), greedy(200))
    short = engine.submit(random_prompt(20, 2), Plain(), greedy(30))
    finish(engine)
    assert (long.finish_reason, type(long.error)) == ("error", KVMemoryExhausted)
    assert list(long.emitted) == list(emitted(model, long.prompt, greedy(200))[: len(long.emitted)])
    assert len(long.tokens) == 6 * PAGE + 1
    assert short.emitted == emitted(model, short.prompt, greedy(30))
    with pytest.raises(KVMemoryExhausted, match="97 tokens"):
        engine.submit(random_prompt(97, 1), Plain())


def test_one_long_text_beside_short_ones_costs_what_it_holds(model: Decoder) -> None:
    engine = Engine(model, Limits(kv_memory=pages(model, 60 + 8 * 3)))
    engine.submit(random_prompt(900, 1), Plain(), greedy(20))
    for i in range(7):
        engine.submit(random_prompt(20, i), Plain(), greedy(20))
    while not all(request.ready for request in engine.requests):
        engine.step()
    held = [len(request.cache.pages) for request in engine.requests]  # type: ignore[union-attr]
    assert sorted(held)[-1] == 57
    assert sum(held) <= 57 + 7 * 3


def test_requests_wait_for_their_turn(model: Decoder) -> None:
    engine = Engine(model, Limits(max_requests=2, max_queue=2))
    first, second = (engine.submit(random_prompt(9, i), Plain(), greedy(3 + i)) for i in range(2))
    engine.step()
    waiting = [engine.submit(random_prompt(9, i), Plain(), greedy(3)) for i in range(2)]
    with pytest.raises(QueueFull, match="4 requests run or wait"):
        engine.submit(random_prompt(9, 1), Plain())
    order: list[Request] = []
    while engine.requests:
        engine.step()
        order += [one for one in (first, second, *waiting) if one.finish_reason and one not in order]
    assert order == [first, second, *waiting]


def test_a_request_ends_at_its_deadline(model: Decoder) -> None:
    engine = Engine(model)
    hasty = engine.submit(random_prompt(9, 1), Plain(), greedy(500), timeout=0.05)
    other = engine.submit(random_prompt(9, 2), Plain(), greedy(20))
    while not other.finish_reason:
        engine.step()
    time.sleep(0.05)
    engine.step()
    assert hasty.finish_reason == "deadline"
    assert list(hasty.emitted) == list(emitted(model, hasty.prompt, greedy(hasty.added)))
    with pytest.raises(InvalidOption, match="timeout"):
        engine.submit(random_prompt(9, 1), Plain(), timeout=0)


def test_threads_share_an_engine(model: Decoder) -> None:
    engine = Engine(model)
    prompts = [random_prompt(20, i) for i in range(6)]
    found: dict[int, list[int]] = {}

    def read(which: int) -> None:
        method = Llma() if which % 2 else Plain()
        pieces = engine.run(engine.submit(prompts[which], method, greedy(40)))
        found[which] = [token for piece in pieces for token in piece]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == [emitted(model, prompt, greedy(40)) for prompt in prompts]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"kv_memory": 0}, "kv_memory must be at least 1"),
        ({"kv_memory": 100}, "one page .* takes 16384 bytes"),
        ({"kv_memory": 2**60}, "bytes of free memory"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_rows": 1.5}, "max_rows"),
        ({"max_queue": -1}, "max_queue"),
    ],
)
def test_limits_that_cannot_be_kept(model: Decoder, limits: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        Engine(model, Limits(**limits))


def test_memory_of_transformers_models_has_no_limit(exact: TransformersModel) -> None:
    with pytest.raises(InvalidOption, match="transformers"):
        Engine(exact, Limits(kv_memory=2**20))


def test_a_stop_that_raises_ends_its_own_request(model: Decoder) -> None:
    class Broken:
        def watch(self, prompt: object) -> Broken:
            return self

        cut = None

        def find(self, tokens: Sequence[int], least: int) -> int | None:
            raise RuntimeError("broken")

    engine = Engine(model)
    failing = engine.submit(random_prompt(9, 1), Plain(), greedy(9), stop=Broken())
    other = engine.submit(random_prompt(9, 2), Plain(), greedy(9))
    finish(engine)
    assert (failing.finish_reason, str(failing.error)) == (
        "error",
        "a stopping criterion raised RuntimeError: broken",
    )
    assert other.emitted == emitted(model, other.prompt, greedy(9))


def test_rows_that_others_need_are_left(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: the first to draft takes all rows."""
    fit = Scheduler.fit

    def greedily(self: Scheduler, request: Request, tree: Tree, rows: int) -> Tree | None:
        return fit(self, request, tree, rows - len(self.running))

    monkeypatch.setattr(Scheduler, "fit", greedily)
    with pytest.raises(AssertionError):
        test_rows_of_a_step_keep_to_the_limit(model, monkeypatch, 20)


@pytest.mark.parametrize("fault", ["stall", "shared", "prefix"])
def test_faults_are_seen(model: Decoder, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stall":
        monkeypatch.setattr(scheduler, "MAX_STALL", 9.0)
        check = test_a_prompt_is_read_beside_the_steps_of_others
    elif fault == "shared":
        monkeypatch.setattr(Request, "reads_what", lambda self, other: False)
        check = test_what_two_prompts_share_is_read_once
    else:  # pages are found by their own tokens, whatever stands before them
        key = PagedCache.key
        monkeypatch.setattr(PagedCache, "key", lambda self, tokens: ("", key(self, tokens)[1]))
        check = test_what_two_prompts_share_is_read_once
    with pytest.raises(AssertionError):
        check(model)
