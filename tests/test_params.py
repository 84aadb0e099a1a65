"""What a request may ask: ranges, names, and the ends that follow from it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from selfdraft import SamplingParams
from selfdraft.errors import InvalidOption

NUMBERS = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 5},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"logprobs": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ""},
        {"stop": ("a", "")},
        {"eos": (3,), "ignore_eos": True},
        *({name: value} for name in NUMBERS for value in (math.nan, math.inf, -math.inf, 1e300, -1e300)),
        *({name: 1e-300} for name in ("temperature", "repetition_penalty")),
        *({"logit_bias": {3: value}} for value in (math.nan, math.inf, 1e300, -1e300)),
    ],
    ids=str,
)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    """Also numbers that would overflow float32: 0 x inf is no number, and the text would be anything."""
    for make in (lambda: SamplingParams(**options), lambda: SamplingParams.read(options)):
        with pytest.raises(InvalidOption, match=next(iter(options))) as caught:
            make()
        assert caught.value.option == next(iter(options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e30},
        {"temperature": 1e-30},
        {"presence_penalty": -1e30},
        {"repetition_penalty": 1e-30},
        {"logit_bias": {3: -math.inf, 4: 1e30}},
        {"top_p": 1.0, "min_p": 1.0},
        {"seed": 2**64 - 1},
    ],
    ids=str,
)
def test_values_at_the_edge(options: dict[str, Any]) -> None:
    assert SamplingParams.read(options) == SamplingParams(**options)


def test_text_is_read_as_the_type_of_the_field() -> None:
    given = {"max_new_tokens": "20", "temperature": "0.5", "stop": ["a"], "eos": [3]}
    assert SamplingParams.read(given) == SamplingParams(20, temperature=0.5, stop=("a",), eos=(3,))


def test_what_is_read_changes_only_what_it_names() -> None:
    base = SamplingParams(max_new_tokens=9, temperature=0.5, seed=3)
    assert SamplingParams.read({"seed": 4}, base) == SamplingParams(max_new_tokens=9, temperature=0.5, seed=4)
    assert SamplingParams.read({}, base) == base
    with pytest.raises(InvalidOption, match="beams"):
        SamplingParams.read({"beams": 4}, base)
    with pytest.raises(InvalidOption, match="temperature") as caught:
        SamplingParams.read({"temperature": "hot"})
    assert caught.value.option == "temperature"


def test_ends() -> None:
    assert SamplingParams().end_ids([1, 2]) == {1, 2}
    assert SamplingParams(eos=(5,)).end_ids([1, 2]) == {5}
    assert SamplingParams(eos=()).end_ids([1, 2]) == set()
    assert SamplingParams(ignore_eos=True).end_ids([1, 2]) == set()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")  # type: ignore[arg-type]
