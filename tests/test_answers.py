"""What a request may ask for, end to end: stops, ends, samples, logprobs, chats and kept requests."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import selfdraft
from selfdraft import LLM, Conversation, DraftContext, Engine, Step, Tree, errors
from selfdraft.engine.scheduler import Limits

from runs import greedy, sampled

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), "jacobi")


@pytest.fixture
def chatty(folder: Path) -> LLM:
    llm = LLM(str(folder), "llma")
    llm.tokenizer.chat_template = TEMPLATE
    return llm


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 4}])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_stop_string_cuts_text_and_tokens(llm: LLM, sampling: dict[str, float], width: int) -> None:
    """Tokens up to the one that completes it, text up to where it begins, streamed or not."""
    free = llm.generate("def add", max_new_tokens=30, **sampling)
    for start in range(0, len(free.text) - width, 7):
        stop = free.text[start : start + width]
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        cut = llm.generate("def add", stop=[stop, "never seen"], max_new_tokens=30, **sampling)
        assert cut.text == free.text[: free.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert list(cut.ids) == list(free.ids[: cut.tokens])
        decode = llm.tokenizer.decode
        assert stop in decode(cut.ids)
        assert stop not in decode(cut.ids[:-1])
        stream = llm.stream("def add", stop=stop, max_new_tokens=30, **sampling)
        assert "".join(chunk.text for chunk in stream) == stream.result.text == cut.text


def test_text_that_only_began_a_stop_string_is_shown(llm: LLM) -> None:
    free = llm.generate("def add", max_new_tokens=30)
    nearly = [free.text[i : i + 3] + "\N{BELL SYMBOL}" for i in range(len(free.text) - 3)]
    stream = llm.stream("def add", stop=nearly, max_new_tokens=30)
    assert "".join(chunk.text for chunk in stream) == stream.result.text == free.text
    assert stream.result.finish_reason == "length"


def test_ends(llm: LLM) -> None:
    free = llm.generate("class", max_new_tokens=30)
    first, later = free.ids[4], free.ids[11]
    assert llm.generate("class", eos=[first, later]).ids == free.ids[: free.ids.index(first) + 1]
    ended = llm.generate("class", eos=[later], max_new_tokens=30)
    assert (ended.ids[-1], ended.finish_reason) == (later, "eos")
    late = llm.generate("class", eos=[first], min_new_tokens=20, max_new_tokens=30)
    assert late.tokens > 20
    assert first not in late.ids[:20]
    llm.eos_ids = frozenset([later])
    assert llm.generate("class", ignore_eos=True, max_new_tokens=30).ids == free.ids
    llm.eos_ids = frozenset([1])
    stop = next(char for char in llm.tokenizer.decode(free.ids[:8]) if char.isalpha())
    early = llm.generate("class", stop=stop, max_new_tokens=30)
    assert early.tokens <= 8
    waits = llm.generate("class", stop=stop, min_new_tokens=9, max_new_tokens=30)
    assert waits.tokens > 9
    assert stop in waits.text, "a stop string before min_new_tokens is text"


def test_samples_of_one_prompt_read_it_once(llm: LLM) -> None:
    prompt = "def add(a, b): return a + b  # " * 4
    llm.engine = Engine(llm.model)
    samples = llm.generate(prompt, n=3, temperature=1.0, seed=5, max_new_tokens=20)
    assert [s.sample for s in samples] == [0, 1, 2]
    assert len({s.text for s in samples}) == 3
    alone = llm.using("plain").generate(prompt, temperature=1.0, seed=5, n=1, max_new_tokens=20)
    assert alone[0].ids == samples[0].ids
    assert [s.reused for s in samples] == [0] + [samples[0].prompt_tokens - 1] * 2
    flat = llm.generate(["a", "class"], n=2, temperature=1.0, seed=5, max_new_tokens=4)
    assert [s.sample for s in flat] == [0, 1, 0, 1]
    short = llm.generate("a", n=2, temperature=1.0, seed=5, max_new_tokens=1)
    assert [s.tokens for s in short] == [1, 1]


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    result = llm.generate(
        "def add", logprobs=3, temperature=0.7, repetition_penalty=1.5, seed=2, max_new_tokens=15
    )
    plain = llm.using("plain").generate(
        "def add", logprobs=3, temperature=0.7, repetition_penalty=1.5, seed=2, max_new_tokens=15
    )
    assert result.logprobs == plain.logprobs, "exact numerics: the same bits"
    assert result.logprobs is not None
    model = llm.model
    prompt = [0, *llm.encode("def add", special=False)]
    own = model.reference([*prompt, *result.ids]).double().log_softmax(-1)[len(prompt) - 1 :]
    for row, token, said in zip(own, result.ids, result.logprobs, strict=False):
        assert said.token == token
        assert said.logprob == pytest.approx(float(row[token]), abs=0.05)
        assert len(said.top) == 3
        assert [p for _, p in said.top] == sorted((p for _, p in said.top), reverse=True)
        assert said.top[0][1] == pytest.approx(float(row.max()), abs=0.05)
    assert llm.generate("def add", max_new_tokens=2).logprobs is None


def test_messages_take_the_chat_template(chatty: LLM) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add"}]
    told = chatty.generate(messages=messages, max_new_tokens=12)
    text = "<system>be brief\n<user>add\n<assistant>"
    assert told.ids == chatty.generate(chatty.encode(text, special=False), max_new_tokens=12).ids
    assert chatty.stream(messages=messages, max_new_tokens=12).result.prompt_tokens == told.prompt_tokens


def test_parts_of_a_content_are_joined(chatty: LLM) -> None:
    parts = [{"type": "text", "text": "add "}, {"type": "text", "text": "two"}]
    joined = chatty.prompt_ids(None, [{"role": "user", "content": parts}])
    assert joined == chatty.prompt_ids("add two")
    assert joined == chatty.encode("<user>add two\n<assistant>", special=False)


USER = {"role": "user"}


@pytest.mark.parametrize(
    "messages",
    [
        [{**USER, "content": None}],
        [USER],
        [{"content": "x"}],
        [{"role": None, "content": "x"}],
        [{**USER, "content": 3}],
        [{**USER, "content": b"x"}],
        [{**USER, "content": [{"type": "image", "url": "x"}]}],
        [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image", "text": "b"}]}],
        [{**USER, "content": [{"type": "text", "text": None}]}],
        [{**USER, "content": ["x"]}],
        ["x"],
        "x",
        {**USER, "content": "x"},
        [],
    ],
)
def test_messages_that_no_template_takes(chatty: LLM, messages: Any) -> None:
    """Nothing of them is printed into the prompt."""
    with pytest.raises(errors.InvalidPrompt, match="message"):
        chatty.generate(messages=messages)


def test_a_call_of_a_tool_has_no_content(chatty: LLM) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    turns = [{"role": "assistant", "content": None, "tool_calls": calls}]
    chatty.tokenizer.chat_template = "{{ messages[0].tool_calls[0].function.name }}"
    assert chatty.prompt_ids(None, turns) == chatty.encode("add", special=False)


def test_a_prompt_has_one_bos(llm: LLM, chatty: LLM) -> None:
    """The tokenizer adds it; a text that begins with it, or a template that writes it, has it already."""
    wanted = [0, *llm.encode("def", special=False)]
    assert llm.encode("def") == llm.encode("<|bos|>def") == llm.prompt_ids("<|bos|>def") == wanted
    assert llm.encode("<|bos|><|bos|>def") == [0, *wanted], "what is written twice is meant"
    chatty.tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert chatty.prompt_ids("def") == wanted


@pytest.mark.parametrize("method", ["plain", "jacobi"])
def test_the_token_that_ends_a_text_is_left_out(llm: LLM, method: str) -> None:
    """As a stop string is, also where it is no special token, streamed or not."""
    llm = llm.using(method)
    free = llm.generate("class", max_new_tokens=30)
    decode = llm.tokenizer.decode
    end = next(token for token in free.ids[3:] if decode([token]).isascii() and decode([token]).strip())
    ended = llm.generate("class", eos=[end], max_new_tokens=30)
    assert (ended.ids[-1], ended.finish_reason) == (end, "eos")
    prompt = llm.encode("class")
    assert ended.text == decode([*prompt, *ended.ids[:-1]], skip_special_tokens=True)[len("class") :]
    stream = llm.stream("class", eos=[end], max_new_tokens=30)
    assert "".join(chunk.text for chunk in stream) == ended.text
    stopped = llm.generate("class", stop=decode([end]), max_new_tokens=30)
    assert decode([end]) not in stopped.text


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_ends_that_either_file_declares_end_a_text(folder: Path, tmp_path: Path, where: str) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    free = LLM(str(folder), "plain").generate("class", max_new_tokens=20)
    end = free.ids[7]
    config = json.loads((path / where).read_text())
    (path / where).write_text(json.dumps({**config, "eos_token_id": end}))
    ended = LLM(str(path), "plain").generate("class", max_new_tokens=20)
    assert ended.finish_reason == "eos"
    assert list(ended.ids) == list(free.ids[: free.ids.index(end) + 1])


class Failing:
    """A drafter that fails in one request: a method and its drafter in one."""

    def __init__(self, last: int) -> None:
        self.last = last  # token of the prompt that it fails at

    def drafter(self, context: DraftContext) -> Failing:
        return Failing(self.last if context.prompt[-1] == self.last else -1)

    def propose(self, tokens: Sequence[int]) -> Tree:
        assert len(tokens) < 8 or self.last < 0
        return Tree.chain(tokens[-1:])

    def observe(self, step: Step) -> None:
        pass


def test_a_drafter_that_fails_is_told(llm: LLM, chatty: LLM) -> None:
    """Of one prompt it is the error; in a list, that of its own answer."""
    bad, good = "def add(a", "class"
    failing = llm.using(Failing(llm.encode(bad)[-1]))
    right = {prompt: llm.generate(prompt, max_new_tokens=12) for prompt in (bad, good)}
    with pytest.raises(errors.DraftError, match="Failing"):
        failing.generate(bad, max_new_tokens=12)
    broken, whole = failing.generate([bad, good], max_new_tokens=12)
    assert (whole.ids, whole.error) == (right[good].ids, None)
    assert (broken.finish_reason, type(broken.error)) == ("error", errors.DraftError)
    assert list(broken.ids) == list(right[bad].ids[: broken.tokens])
    assert "Failing" in str(broken.figures()["error"])
    json.dumps(broken.figures())
    stream = failing.stream(bad, max_new_tokens=12)
    chunks = iter(stream)
    seen = [token for _ in range(len(broken.runs)) for token in next(chunks).ids]
    with pytest.raises(errors.DraftError):
        next(chunks)
    assert seen == stream.result.ids == broken.ids
    talk = Conversation(chatty.using(Failing(chatty.prompt_ids("x")[-1])))
    with pytest.raises(errors.DraftError):
        talk.send("x", max_new_tokens=12)
    assert talk.messages == []


def test_without_a_seed_each_prompt_draws_its_own(llm: LLM) -> None:
    four = llm.generate(["def add"] * 4, temperature=1.0, max_new_tokens=12)
    assert len({answer.seed for answer in four}) == 4
    assert len({answer.text for answer in four}) == 4
    for answer in four:
        again = llm.generate("def add", temperature=1.0, max_new_tokens=12, seed=answer.seed)
        assert again.ids == answer.ids
    pairs = llm.generate(["def add"] * 2, n=2, temperature=1.0, max_new_tokens=12)
    assert [answer.sample for answer in pairs] == [0, 1, 0, 1]
    assert pairs[0].seed == pairs[1].seed != pairs[2].seed == pairs[3].seed
    assert len({answer.text for answer in pairs}) == 4
    given = llm.generate(["def add"] * 2, temperature=1.0, max_new_tokens=12, seed=3)
    assert given[0].ids == given[1].ids


def test_a_kept_session_is_a_fresh_one(chatty: LLM) -> None:
    """Turn by turn: the same ids as without a cache; only what is new is read."""
    with Conversation(chatty, [{"role": "system", "content": "be brief"}]) as talk:
        for turn, text in enumerate(["def add(a, b)", "class Stack", "return"]):
            said = talk.send(text, max_new_tokens=16, temperature=0.5, seed=turn)
            fresh = chatty.generate(
                messages=talk.messages[:-1], max_new_tokens=16, temperature=0.5, seed=turn
            )
            assert said.ids == fresh.ids
            assert said.reused > 10 or turn == 0
        assert [m["role"] for m in talk.messages] == ["system"] + ["user", "assistant"] * 3
        shorter = talk.generate("def", raw=True, max_new_tokens=6)
        assert shorter.ids == chatty.generate("def", raw=True, max_new_tokens=6).ids
        assert talk.generate("class Stack:", raw=True, max_new_tokens=6).reused == 1, (
            "only the first token is shared"
        )


def test_a_turn_that_fails_or_is_left_spoils_nothing(chatty: LLM) -> None:
    talk = Conversation(chatty)
    prompt = "def add(a, b):\n"
    for chunk in talk.stream(prompt, max_new_tokens=30):
        assert chunk.ids
        break
    with pytest.raises(errors.InvalidPrompt):
        talk.generate("", max_new_tokens=5)
    with pytest.raises(errors.InvalidOption):
        talk.send("x", max_new_tokens=0)
    assert talk.messages == []
    again = talk.generate(prompt, max_new_tokens=30)
    assert again.reused == again.prompt_tokens - 1
    assert again.ids == chatty.generate(prompt, max_new_tokens=30).ids
    talk.stream(prompt)
    talk.close()
    assert not chatty.engine.requests


def test_the_answer_goes_on_where_the_prompt_stops(llm: LLM) -> None:
    """Prompt and text together are the decoded whole, whatever the tokenizer does to first tokens."""
    result = llm.generate("def add(a", max_new_tokens=20)
    ids = [*llm.encode("def add(a"), *result.ids]
    assert "def add(a" + result.text == llm.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stop": ""}, "empty"),
        ({"stop": ["a", ""]}, "empty"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens"),
        ({"eos": [3], "ignore_eos": True}, "contradict"),
        ({"eos": [99999]}, "99999"),
        ({"stop": "<|eos|>"}, "eos=1"),
        ({"stop": ["a", "<|eos|>\n"]}, "eos=1"),
        ({"presence_penalty": 1e300}, "presence_penalty"),
        ({"temperature": 1e300}, "temperature"),
        ({"logit_bias": dict.fromkeys(range(320), float("-inf"))}, "bans every token"),
        ({"n": "3"}, "n must be at least 1; got '3'"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 321}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {400: 1}}, "vocabulary"),
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"n": 2}, "temperature"),
        ({"beams": 4}, "beams"),
    ],
)
def test_what_cannot_be_honoured_is_refused(llm: LLM, options: dict[str, object], says: str) -> None:
    with pytest.raises(errors.InvalidOption, match=says):
        llm.generate("def", **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "references",
    [
        "text",
        None,
        [5, 6],
        [None],
        [["a"]],
        [[2**40]],
        [[-1]],
        [[320]],
        b"text",
        [b"text"],
        [bytearray(b"x")],
        [[True]],
        ["a\udc80"],
    ],
)
def test_bad_references(llm: LLM, references: object) -> None:
    with pytest.raises(errors.InvalidReference, match="reference"):
        llm.generate("def", references=references)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "prompt", [3, ["a", 3], [1.5], [True], b"hello", bytearray(b"hello"), memoryview(b"hello"), "a\udc80b"]
)
def test_bad_prompts(llm: LLM, prompt: object) -> None:
    """Bytes are none, although they hold integers."""
    with pytest.raises(errors.InvalidPrompt):
        llm.generate(prompt)  # type: ignore[call-overload]
    if not isinstance(prompt, str):
        with pytest.raises(errors.InvalidPrompt):
            Engine(llm.model).submit(prompt, llm.method)  # type: ignore[arg-type]


def test_a_lone_surrogate_is_named(llm: LLM, chatty: LLM) -> None:
    with pytest.raises(errors.InvalidPrompt, match="lone surrogate at character 1"):
        llm.generate("a\udc80b")
    for content in ("a\udc80b", [{"type": "text", "text": "a\udc80b"}]):
        with pytest.raises(errors.InvalidPrompt, match="lone surrogate"):
            chatty.generate(messages=[{"role": "user", "content": content}])


def test_references_may_be_longer_than_the_context(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Without transformers' warning that such a text cannot be used."""
    llm = llm.using("llma")
    llm.tokenizer = copy.deepcopy(llm.tokenizer)
    llm.tokenizer.model_max_length = 256
    llm.tokenizer.deprecation_warnings.clear()  # it warns once
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    try:
        long = "return self.items " * 100
        assert len(llm.encode(long)) > 256
        assert llm.generate("def", references=[long], max_new_tokens=5).tokens == 5
        hook = selfdraft.hook(tokenizer=llm.tokenizer, references=[long])
        assert len(hook.references[0]) > 256
    finally:
        transformers.removeHandler(caplog.handler)
    assert caplog.records == []


def test_a_list_of_prompts_takes_parameters_and_references_of_each(llm: LLM) -> None:
    """As if each were asked alone; and what is wrong names the prompt."""
    prompts = ["def add", "class Tree", "for i in"]
    params = [greedy(9), sampled(0.8, seed=5, tokens=7), greedy(3)]
    quoted = [["def add(a, b):"], [], [[5, 6, 7]]]
    together = llm.generate(prompts, params, references=quoted)
    alone = [
        llm.generate(one, own, references=others)
        for one, own, others in zip(prompts, params, quoted, strict=True)
    ]
    assert [one.ids for one in together] == [one.ids for one in alone]
    with pytest.raises(errors.InvalidOption, match="one for each"):
        llm.generate(prompts, params[:2])
    with pytest.raises(errors.InvalidReference, match="3 prompts and 2 lists"):
        llm.generate(prompts, references=quoted[:2])
    with pytest.raises(errors.InvalidPrompt, match=r"prompt 1: .*context"):
        llm.generate(["def add", "x " * 400], max_new_tokens=2)


def test_seeds_of_a_list(llm: LLM) -> None:
    """Without a seed each prompt and each sample has its own; with one the same prompt says the same."""
    asked: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 12}
    free = llm.generate(["def add"] * 3, n=2, **asked)
    assert len({tuple(one.ids) for one in free}) == 6
    assert len({one.seed for one in free}) == 3
    seeded = llm.generate(["def add"] * 3, seed=4, **asked)
    assert {tuple(one.ids) for one in seeded} == {tuple(llm.generate("def add", seed=4, **asked).ids)}


def test_many_prompts_stream_through_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some requests exist at a time, and an interrupt leaves none behind."""
    made = llm.using("plain")
    made.engine, most = Engine(made.model, Limits(max_requests=2)), 0
    step = Engine.step

    def counted(self: Engine) -> None:
        nonlocal most
        most = max(most, len(self.requests))
        step(self)

    monkeypatch.setattr(Engine, "step", counted)
    prompts = [f"def f{i}" for i in range(12)]
    found = made.generate(prompts, max_new_tokens=3)
    assert [one.ids for one in found] == [llm.generate(one, max_new_tokens=3).ids for one in prompts]
    assert most == 4

    def interrupted(self: Engine) -> None:
        step(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.generate(prompts, max_new_tokens=3)
    assert not made.engine.requests


def test_bad_conversations(llm: LLM, chatty: LLM) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(errors.InvalidOption, match="chat template"):
        llm.generate(messages=messages)
    with pytest.raises(errors.InvalidPrompt, match="one of"):
        llm.generate()
    with pytest.raises(errors.InvalidPrompt, match="one of"):
        chatty.generate("x", messages=messages)
    chatty.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(errors.InvalidPrompt, match="no such role"):
        chatty.generate(messages=messages)


def test_a_seed_keeps_its_text_when_samples_are_added(llm: LLM) -> None:
    one = llm.generate("return", temperature=1.2, seed=9, max_new_tokens=10)
    two = llm.generate("return", temperature=1.2, seed=9, max_new_tokens=10, n=2)
    assert two[0].ids == one.ids
    assert torch.tensor(two[1].ids).tolist() != one.ids
