"""The pool of threads is shared by all models of a process: every caller gets the bits of one thread."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch
from torch import Tensor

from selfdraft.drafting.plain import Plain
from selfdraft.models.decoder import Decoder
from selfdraft.models.kernels import library as kernels

from runs import greedy, random_prompt, run
from test_decoder import build, chain, decoder, read, tree_at

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def prompt_and_tree(model: Decoder, ids: list[int], chunk: int) -> Tensor:
    """Logits of a prompt and of a tree behind it, on a pool of its own."""
    logits, cache = chain(model, ids[:-3], chunk)
    return torch.cat([logits, read(model, cache, tree_at(ids, len(ids) - 3))])


@pytest.mark.parametrize("name", kernels.builds())
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    ids, library = random_prompt(280, seed=1), build(name)  # more than a partition
    expected = prompt_and_tree(decoder("q4", library, 1), ids, 280)
    for threads in range(2, 17):
        assert torch.equal(prompt_and_tree(decoder("q4", library, threads), ids, 280), expected), threads


def test_callers_at_once_on_one_model_and_on_several() -> None:
    """With numbers of threads that differ, so that workers join some jobs and not others; one thread runs
    beside the others' jobs."""
    library = build()
    models = [decoder("q4", library, threads) for threads in (1, 2, 3, 5)]
    jobs = [(model, random_prompt(40, seed)) for seed, model in enumerate([*models, models[1]])]
    expected = [prompt_and_tree(model, ids, 40) for model, ids in jobs]
    start = Barrier(len(jobs))

    def repeat(job: tuple[Decoder, list[int]]) -> list[Tensor]:
        dice = random.Random(0)
        start.wait()
        return [prompt_and_tree(*job, dice.randint(3, 40)) for _ in range(20)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for found, right in zip(pool.map(repeat, jobs), expected, strict=True):
            assert all(torch.equal(one, right) for one in found)


def test_two_threads_with_an_engine_each() -> None:
    model = decoder("q4", threads=2)
    prompts = [random_prompt(40, seed) for seed in range(2)]
    alone = [run(model, Plain(), prompt, greedy(60)).emitted for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            both = pool.map(lambda prompt: run(model, Plain(), prompt, greedy(60)).emitted, prompts)
            assert list(both) == alone


@needs_fork
@pytest.mark.parametrize("stepping", [False, True])
def test_a_child_of_a_fork_has_threads_of_its_own(stepping: bool) -> None:
    """Also where another thread was amid a step, and held the pool."""
    model = decoder("bf16", threads=3)
    ids = random_prompt(40, seed=6)
    expected, _ = chain(model, ids, 40)
    stop = Event()

    def step() -> None:
        while not stop.is_set():
            chain(model, ids, 40)

    other = Thread(target=step)
    if stepping:
        other.start()
    try:
        for _ in range(5 if stepping else 1):
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(chain(model, ids, 40)[0], expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
    if stepping:
        other.join()
    assert torch.equal(chain(model, ids, 40)[0], expected)
