"""What a request says about the form of its answer, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InvalidOption
from ..sampling import grammar
from ..sampling.grammar import Grammar
from .errors import refused
from .prompts import THINK, Rendered
from .requests import MAX_GRAMMAR, Asked, ChatRequest, ResponseFormat, Tool
from .serving import Serving
from .tools import CLOSE, OPEN

ANY_OBJECT = {"type": "object"}
AS_TEMPLATES_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The spaces in a call: as in the calls of a template's history, and never an endless row of them."""


def grammar_of(
    asked: Asked, form: ResponseFormat | None, serving: Serving, tools: Sequence[Tool] = ()
) -> Grammar | None:
    """The grammar that a request asks for, checked. tools: those of which one must be called.

    Raises ApiError for a grammar that is unsound, and for two of them."""
    found = [
        (name, made)
        for name, made in (
            ("response_format", _of_format(form)),
            ("guided_regex", asked.guided_regex and Grammar("regex", asked.guided_regex)),
            ("guided_grammar", asked.guided_grammar and Grammar("lark", asked.guided_grammar)),
            ("tool_choice", _of_tools(tools, serving) if tools else None),
        )
        if made
    ]
    if not found:
        return None
    if len(found) > 1:
        raise refused(f"give one of {' and '.join(name for name, _ in found)}", found[1][0])
    name, made = found[0]
    for other in ("ignore_eos", "min_tokens"):
        if getattr(asked, other):
            raise refused(f"{other} does not go with {name}: the grammar says where the answer ends", other)
    try:
        grammar.check(made)
    except InvalidOption as error:
        raise refused(str(error), name) from error
    return made


def chat_grammar(
    asked: ChatRequest, tools: Sequence[Tool], rendered: Rendered, serving: Serving
) -> Grammar | None:
    """The same for a chat, where the model may think first."""
    forced = tools if asked.tool_choice not in (None, "auto", "none") else ()
    if tools and not forced and asked.response_format is not None and asked.response_format.type != "text":
        raise refused("response_format does not go with tools that may be called", "response_format")
    made = grammar_of(asked, asked.response_format, serving, forced)
    if made is None or not rendered.reasons:
        return made
    opening, closing = map(serving.llm.tokenizer.get_vocab().get, THINK)
    if opening is None or closing is None:
        if rendered.reasoning:
            raise refused("this model's </think> is no token of its own, so a grammar cannot begin behind it")
        return made
    return replace(made, think=(opening, closing), thinking=rendered.reasoning)


def _of_format(form: ResponseFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return _of_schema(ANY_OBJECT)
    stated = form.json_schema or {}
    if not isinstance(stated.get("schema"), Mapping):
        raise refused("response_format.json_schema has no schema", "response_format")
    return _of_schema(stated["schema"])


def _of_schema(schema: Mapping[str, Any]) -> Grammar:
    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR:
        raise refused(f"the schema has {len(text)} characters; at most {MAX_GRAMMAR}", "response_format")
    return Grammar("json_schema", text)


def _of_tools(tools: Sequence[Tool], serving: Serving) -> Grammar:
    """One call of one of these functions, in the format of the model's template."""
    field = "arguments" if serving.prompts.tool_format == "hermes" else "parameters"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                field: tool.function.parameters or ANY_OBJECT,
            },
            "required": ["name", field],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = json.dumps({"anyOf": calls, "x-guidance": AS_TEMPLATES_WRITE})
    if len(schema) > MAX_GRAMMAR:
        raise refused(f"the tools have {len(schema)} characters; at most {MAX_GRAMMAR}", "tools")
    if serving.prompts.tool_format == "llama":
        return Grammar("json_schema", schema)
    marks = [_mark(tag, serving) for tag in (OPEN, CLOSE)]
    return Grammar("lark", f'start: {marks[0]} "\\n" call "\\n" {marks[1]}\ncall: %json {schema}\n')


def _mark(tag: str, serving: Serving) -> str:
    """How a tag stands in a Lark grammar: bare where it is a token of its own, else as text."""
    return tag if tag in serving.llm.tokenizer.get_added_vocab() else json.dumps(tag)
