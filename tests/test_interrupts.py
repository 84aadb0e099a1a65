"""An interrupt at any moment leaves the kernels, the pages and torch as they were: the next step is right."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import pytest
import torch

from selfdraft.drafting.method import DraftContext
from selfdraft.drafting.plain import Plain, PlainDrafter
from selfdraft.engine.engine import Engine
from selfdraft.engine.scheduler import Limits
from selfdraft.engine.tree import Tree
from selfdraft.errors import InvalidOption
from selfdraft.models import paged_cache
from selfdraft.models.decoder_work import DecoderPool
from selfdraft.models.paged_cache import PagePool

from runs import greedy, random_prompt, run
from test_decoder import TREE, chain, decoder, read

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt")
INTERRUPTS = 150


class Interrupts:
    """Raises KeyboardInterrupt in the main thread at random moments."""

    def __init__(self) -> None:
        self.count = 0
        self._armed = False
        self._dice = random.Random(0)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def during(self, work: Callable[[], object], within: float) -> None:
        """Run some work, and interrupt it within so many seconds unless it ends before."""
        try:
            try:
                self._armed = True
                signal.setitimer(signal.ITIMER_REAL, self._dice.uniform(1e-5, within))
                work()
            finally:
                self._armed = False
        except KeyboardInterrupt:
            self.count += 1


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    made = Interrupts()
    before = signal.signal(signal.SIGALRM, made)
    try:
        yield made
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_steps(count: int, within: float = 1e-3) -> None:
    """Interrupt forwards on one pool, and compare the step after each."""
    model = decoder("q4", threads=3)
    ids = random_prompt(40, seed=7)
    tree = Tree(*TREE)
    _, cache = chain(model, ids, 40)
    expected = read(model, cache, tree)

    def fresh() -> None:
        other = cache.pool.open()
        try:
            read(model, other, Tree.chain(ids))
            other.keep(range(len(ids)), [])
            read(model, other, tree)
        finally:
            other.close()

    with interrupts() as interrupt:
        while interrupt.count < count:
            interrupt.during(fresh, within)
            assert torch.equal(read(model, cache, tree), expected)
    assert len(set(cache.pool._free)) == len(cache.pool._free)
    assert not set(cache.pool._free) & set(cache.pages)


def check_texts(count: int, within: float = 2e-2) -> None:
    """Interrupt requests of one engine, and compare the text of the next one."""
    model = decoder("q4", threads=3)
    prompt = random_prompt(40, seed=7)
    expected = run(model, Plain(), prompt, greedy(20)).emitted
    engine = Engine(model)

    def text() -> list[int]:
        request = engine.submit(prompt, Plain(), greedy(20))
        return [token for tokens in engine.run(request) for token in tokens]

    with interrupts() as interrupt:
        while interrupt.count < count:
            interrupt.during(text, within)
            for request in list(engine.requests):  # interrupted before it ran
                engine.cancel(request)
            assert text() == expected
    assert torch.get_num_threads() == 2


def test_the_step_after_an_interrupt_is_right() -> None:
    check_steps(INTERRUPTS)


def test_the_text_after_an_interrupt_is_right() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_texts(INTERRUPTS // 5)
    finally:
        torch.set_num_threads(before)


def test_pages_are_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while they are given back, which `close` then does again."""

    def interrupted(self: PagePool, pages: list[int]) -> None:
        self._free.extend(pages)
        raise KeyboardInterrupt

    model = decoder()
    cache = model.pool().open()
    cache.reserve(40)
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "give_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.close()
    cache.close()
    assert len(set(cache.pool._free)) == len(cache.pool._free)


def finish(engine: Engine) -> None:
    while engine.requests:
        engine.step()


class Interrupted(Plain):
    """A drafter during which the user interrupts."""

    def drafter(self, context: DraftContext) -> PlainDrafter:
        return InterruptedDrafter()


class InterruptedDrafter(PlainDrafter):
    def propose(self, tokens: Sequence[int]) -> Tree:
        raise KeyboardInterrupt


def test_an_interrupted_engine_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine has none left for as much again."""
    model, prompt = decoder("q4"), random_prompt(40, seed=7)
    expected = run(model, Plain(), prompt, greedy(20)).emitted
    engine = Engine(model, Limits(kv_memory=2**20))
    held = engine.pool.tokens
    monkeypatch.setattr(paged_cache, "available_memory", lambda: 2**16)
    for _ in range(3):
        others = [engine.submit(prompt, method, greedy(20)) for method in (Plain(), Interrupted())]
        with pytest.raises(KeyboardInterrupt):
            finish(engine)
        assert [other.finish_reason for other in others] == ["cancelled", "cancelled"]
        assert engine.pool.free == engine.pool.tokens == held
        again = engine.submit(prompt, Plain(), greedy(20))
        assert [token for tokens in engine.run(again) for token in tokens] == expected


def test_taking_memory_anew_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecoderPool, "renewed", lambda self: decoder("q4").pool(2**20), raising=True)
    with pytest.raises(InvalidOption, match="free memory"):
        test_an_interrupted_engine_keeps_its_memory(monkeypatch)
