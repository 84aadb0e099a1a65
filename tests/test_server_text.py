"""Reasoning, content and calls: the same parts however the text is cut into pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from selfdraft.server import split
from selfdraft.server.split import Delta, Splitter
from selfdraft.server.tools import Call, tool_format

NAMES = frozenset({"add", "look"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LLAMA = '{"name": "look", "parameters": {"x": "y"}}'


def parts(pieces: list[str], **options: Any) -> tuple[str, str, list[Call]]:
    """Reasoning, content and calls."""
    splitter = Splitter(**options)
    found = [part for i, piece in enumerate(pieces) for part in splitter.add(piece, i == len(pieces) - 1)]
    text = {
        name: "".join(part.text for part in found if isinstance(part, Delta) and part.part == name)
        for name in ("reasoning", "content")
    }
    return text["reasoning"], text["content"], [part for part in found if isinstance(part, Call)]


HERMES: dict[str, Any] = {"tools": "hermes", "names": NAMES}


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("plain <think> text", {}, ("", "plain <think> text", [])),
        ("<think>\nhm\n</think>\n\nyes", {"reasons": True}, ("hm\n", "yes", [])),
        ("no thoughts", {"reasons": True}, ("", "no thoughts", [])),
        ("<thin air", {"reasons": True}, ("", "<thin air", [])),
        ("hm</think>yes", {"reasoning": True}, ("hm", "yes", [])),
        ("never ends <", {"reasoning": True}, ("never ends <", "", [])),
        (f"first {CALL}", HERMES, ("", "first ", [Call("add", '{"a": 1}')])),
        (f"{CALL}\n{CALL}", HERMES, ("", "", [Call("add", '{"a": 1}')] * 2)),
        ("<tool_call>{broken</tool_call> x", HERMES, ("", "<tool_call>{broken</tool_call> x", [])),
        ("<tool_call>never ends", HERMES, ("", "<tool_call>never ends", [])),
        (CALL.replace("add", "other"), HERMES, ("", CALL.replace("add", "other"), [])),
        (CALL.replace('"add"', "{}"), HERMES, ("", CALL.replace('"add"', "{}"), [])),
        (CALL, {}, ("", CALL, [])),
        (LLAMA, {"tools": "llama", "names": NAMES}, ("", "", [Call("look", '{"x": "y"}')])),
        (
            f"<|python_tag|>{LLAMA}",
            {"tools": "llama", "names": NAMES},
            ("", "", [Call("look", '{"x": "y"}')]),
        ),
        (CALL[12:-13], HERMES, ("", "", [Call("add", '{"a": 1}')])),
        ('{"a": 1} and', HERMES, ("", '{"a": 1} and', [])),
        ('{"a": 1}', {"tools": "llama", "names": NAMES}, ("", '{"a": 1}', [])),
        ("words", {"tools": "llama", "names": NAMES}, ("", "words", [])),
        (f"<think>a</think>{CALL}", {"reasons": True, **HERMES}, ("a", "", [Call("add", '{"a": 1}')])),
    ],
)
def test_parts_do_not_depend_on_the_pieces(text: str, options: dict[str, Any], expected: Any) -> None:
    assert parts([text], **options) == expected
    assert parts([*text, ""], **options) == expected
    for size in (2, 3, 7):
        assert parts([text[i : i + size] for i in range(0, len(text), size)], **options) == expected


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "a", "<", " ", "\n", *CALL.split(" ")]), max_size=12
)


def cut_as_one(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Any text in any pieces has the parts of the whole."""

    @given(PIECES, st.booleans(), st.booleans())
    @hypothesis_settings(max_examples=150, deadline=None)
    def check(pieces: list[str], reasons: bool, reasoning: bool) -> None:
        options: dict[str, Any] = {"reasons": reasons, "reasoning": reasoning, **HERMES}
        whole = "".join(pieces)
        assert parts([*pieces, ""], **options) == parts([whole], **options) == parts([*whole, ""], **options)

    check()


def test_any_text_in_any_pieces() -> None:
    cut_as_one()


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_safe", lambda text, tag: len(text))  # the beginning of a tag is shown
    with pytest.raises(AssertionError):
        cut_as_one()


def test_formats_that_templates_state() -> None:
    qwen = 'return <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    llama = 'Environment: ipython\n Respond in the format {"name": function name, "parameters": dictionary}'
    assert tool_format(qwen) == "hermes"
    assert tool_format(llama) == "llama"
    assert tool_format("<tool_call><function=name><parameter=x>") is None
    assert tool_format("{{ messages }}") is None
