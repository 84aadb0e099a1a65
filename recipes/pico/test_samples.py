"""Samples on the card: whole texts, whatever they hold, and long prompts visibly cut."""

from __future__ import annotations

import re

import pytest

from samples import Sample, begun, block, section, shortened

TEXTS = [
    "x = 1\n",
    "no line break at the end",
    "",
    "```python\ndef f():\n    pass\n```\n",
    "````\n```\nfences in fences\n```\n````\n",
]


def shown(text: str) -> list[str]:
    """What a reader of Markdown takes for fenced texts."""
    fenced = re.findall(r"^(`{3,})text\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    return [inside for _, inside in fenced]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_its_fence(text: str) -> None:
    assert shown(block(text)) == [text if text.endswith("\n") else f"{text}\n"]


def test_a_fence_of_three_would_not_do() -> None:
    assert shown(f"```text\n{TEXTS[3]}```") != [TEXTS[3]]


def test_section_holds_all_samples_in_order() -> None:
    drawn = {
        "An edit": [Sample(f"{text}\n\n", text, "ended by itself after 3 tokens") for text in TEXTS]
    }
    found = shown(section(drawn))
    assert found[1::2] == [text if text.endswith("\n") else f"{text}\n" for text in TEXTS]
    assert found[::2] == [f"{text}\n\n" for text in TEXTS]


def test_long_prompts_keep_their_first_and_last_lines() -> None:
    lines = [f"{n}\n" for n in range(20)]
    assert shortened("".join(lines[:12])) == "".join(lines[:12])
    kept = shortened("".join(lines)).splitlines(keepends=True)
    assert kept == ["0\n", "[... lines left out: 8 ...]\n", *lines[9:]]


def test_a_file_is_begun_up_to_its_half() -> None:
    assert begun("".join(f"{n}\n" for n in range(7))) == "0\n1\n2\n"
    assert len(begun("x\n" * 1000).splitlines()) == 40
    assert begun("alone") == ""
