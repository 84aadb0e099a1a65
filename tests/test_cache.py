"""The buffers: kept rows == fresh rows, lanes move without loss, nothing hidden leaks."""

from __future__ import annotations

import pytest
import torch

from selfdraft import Tree
from selfdraft.models.kv_cache import Lane, Lanes
from selfdraft.models.transformers import TransformersModel

from conftest import tiny_llama
from runs import random_prompt

PATHS = [[0, 1, 2], [0], [0, 3, 4], [0, 1, 5]]
BUSHY = Tree(tuple(random_prompt(6, seed=2)), (-1, 0, 1, 0, 3, 1))


def write(lanes: Lanes, which: list[Lane], rows: int, value: float) -> torch.Tensor:
    """One forward's worth of keys for some lanes; each lane and row its own number."""
    lanes.bind(which, rows)
    new = value + torch.arange(rows).float()[None, None, :, None] + torch.zeros(len(which), 2, 1, 8)
    new += 1000 * torch.arange(len(which))[:, None, None, None]
    keys, _ = lanes.update(new, -new, 0)
    return keys


@pytest.mark.parametrize("path", PATHS)
def test_kept_is_fresh(exact: TransformersModel, path: list[int]) -> None:
    """What follows a kept path == what follows the same tokens read as a prompt."""
    history, after = random_prompt(11, seed=1), random_prompt(3, seed=3)
    pool = exact.pool()
    kept, fresh = pool.open(), pool.open()
    exact.forward([Tree.chain(history)], [kept])
    kept.keep(range(11), [])
    exact.forward([BUSHY], [kept])
    kept.keep(path, [])
    exact.forward([Tree.chain([*history, *(BUSHY.tokens[row] for row in path)])], [fresh])
    fresh.keep(range(11 + len(path)), [])
    rows = exact.forward([Tree.chain(after)] * 2, [kept, fresh])
    one, other = exact.head(rows, [range(3)] * 2)
    assert torch.equal(one, other)


def test_lanes_move_into_the_place_of_those_that_leave() -> None:
    lanes = Lanes()
    a, b, c = (lanes.open() for _ in range(3))
    for lane, value in ((a, 100.0), (b, 200.0), (c, 300.0)):
        write(lanes, [lane], 4, value)
        lane.keep(range(4), [])
    a.close()
    assert [lane.index for lane in (c, b)] == [0, 1]
    keys = write(lanes, [c, b], 1, 7.0)
    assert keys[:, 0, :5, 0].tolist() == [[300, 301, 302, 303, 7], [200, 201, 202, 203, 1007]]
    fresh = lanes.open()
    assert fresh.length == 0
    buffer = lanes.own[0].keys
    assert buffer is not None
    assert not buffer[2].any(), "what an earlier request left is gone"
    assert write(lanes, [c, fresh], 1, 8.0)[[0, 1], 0, [4, 0], 0].tolist() == [8, 1008]


def test_neighbours_are_a_view_and_others_are_gathered() -> None:
    lanes = Lanes()
    a, b, c = (lanes.open() for _ in range(3))
    write(lanes, [a, b, c], 2, 1.0)
    buffer = lanes.own[0].keys
    assert buffer is not None
    assert write(lanes, [b, c], 2, 5.0).data_ptr() == buffer[1].data_ptr()
    apart = write(lanes, [a, c], 2, 9.0)
    assert torch.equal(apart, buffer[[0, 2], :, : lanes.reach])


def test_buffers_grow_and_start_as_zeros() -> None:
    lanes = Lanes(torch.float64)
    lane = lanes.open()
    keys = write(lanes, [lane], 3, 1.0)
    assert keys.dtype == torch.float64
    assert not keys[:, :, 3:].any()
    lane.keep(range(3), [])
    for _ in range(400):
        keys = write(lanes, [lane], 2, 4.0)
        lane.keep([0], [])
    assert keys[0, 0, :5, 0].tolist() == [1, 2, 3, 4, 4]
    assert not keys[0, :, lane.length + 1 :].any()


def test_only_the_rows_asked_for_run_through_the_head() -> None:
    model = TransformersModel(tiny_llama(), "fast")
    seen: list[int] = []
    model._head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    cache = model.pool().open()
    rows = model.forward([BUSHY], [cache])
    (all_,) = model.head(rows, [range(6)])
    (two,) = model.head(rows, [[4, 1]])
    assert seen == [6, 2]
    torch.testing.assert_close(two, all_[[4, 1]])
