"""Calls of tools in a model's text, for the two formats that templates state.

Hermes and Qwen write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, with
text before and between. Llama 3 answers with one JSON object, `{"name": ..., "parameters": {...}}`, and
nothing else. A template that states neither is of an unknown format: tools are then refused. An answer that
is one such object, without tags, is read as a call in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import refused
from .requests import ChatRequest, Tool

ToolFormat = Literal["hermes", "llama"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    """A call that the model has written."""

    name: str
    arguments: str
    """JSON."""


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template tells the model to write; None: it states none that is known."""
    if OPEN in template and '"arguments"' in template:
        return "hermes"
    if "ipython" in template and '"parameters"' in template:
        return "llama"
    return None


def chosen_tools(asked: ChatRequest, known: ToolFormat | None) -> Sequence[Tool]:
    """The tools that the answer may call. Raises ApiError for what cannot be honoured."""
    choice = asked.tool_choice
    if not asked.tools:
        if choice not in (None, "none", "auto"):
            raise refused("tool_choice needs tools", "tool_choice")
        return ()
    if choice == "none":
        return ()
    if known is None:
        raise refused("the chat template of this model states no format of tool calls that is known", "tools")
    if choice in (None, "auto", "required"):
        return asked.tools
    name = choice.get("function", {}) if isinstance(choice, Mapping) else None
    name = name.get("name") if isinstance(name, Mapping) else None
    named = [tool for tool in asked.tools if tool.function.name == name]
    if not named:
        raise refused(f"tool_choice names no tool of this request: {choice!r:.100}", "tool_choice")
    return named


def parse_call(text: str, names: frozenset[str]) -> Call | None:
    """The call that a JSON text states; None if it is none of these functions."""
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(stated, dict):
        return None
    name = stated.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    arguments: Any = stated.get("arguments", stated.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))
