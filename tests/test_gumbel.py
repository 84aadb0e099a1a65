"""Noise against published vectors; keyed by position, whatever is asked for together."""

from __future__ import annotations

import math

import pytest
import torch

from selfdraft.models.decoder import KernelNoise
from selfdraft.models.kernels import library as kernels
from selfdraft.sampling.gumbel import Noise, TorchNoise, gumbel, philox

from test_decoder import build

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known-answer vectors of the authors' Random123 library."""
    got = philox([torch.tensor(word) for word in counter], key[1] << 32 | key[0])
    assert [int(word) for word in got] == words


def test_noise_does_not_depend_on_how_it_is_asked_for() -> None:
    alone = torch.cat([gumbel(9, 2, [p], 103, CPU) for p in range(40)])
    assert torch.equal(gumbel(9, 2, range(40), 103, CPU), alone)
    stream = Noise(9, 2)
    for positions in ([5, 6, 7], [0], [39, 15, 16, 15], [3]):
        assert torch.equal(stream.at(positions, 103, CPU), alone[positions])
    assert torch.equal(gumbel(9, 2, [3], 50, CPU)[0], alone[3, :50])
    for other in (gumbel(8, 2, [3], 103, CPU), gumbel(9, 1, [3], 103, CPU), gumbel(9, 2, [4], 103, CPU)):
        assert not torch.equal(other[0], alone[3])
    assert not torch.equal(gumbel(9 + 2**40, 2, [3], 103, CPU)[0], alone[3])


@pytest.mark.parametrize("name", ["torch", *kernels.builds()])
def test_noise_of_a_few_tokens_is_that_among_all(name: str) -> None:
    source = TorchNoise() if name == "torch" else KernelNoise(build(name))
    for seed, sample, position in ((5, 0, 3), (2**40 + 1, 3, 1000)):
        noise = Noise(seed, sample, source)
        whole = noise.at([position], 1003, CPU)[0]
        few = [1002, 0, 3, 4, 517, 517]
        assert source.few(noise, position, few, 1003, CPU) == whole[few].tolist()
        assert source.few(noise, position + 1, few, 1003, CPU) != whole[few].tolist()


def test_noise_is_gumbel() -> None:
    noise = gumbel(1, 0, range(64), 4096, CPU).double()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
