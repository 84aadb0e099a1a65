"""What a request may ask for, end to end: stops, ends, samples, logprobs, chats and kept requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfdraft import LLM, Conversation, Engine, errors

from runs import greedy

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
    samples = llm.generate("def add(a, b)", n=3, temperature=1.0, seed=5, max_new_tokens=20)
    assert [s.sample for s in samples] == [0, 1, 2]
    assert len({s.text for s in samples}) == 3
    alone = llm.using("plain").generate("def add(a, b)", temperature=1.0, seed=5, n=1, max_new_tokens=20)
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
    talk.close()
    assert talk.generate(prompt, max_new_tokens=3).reused == 0


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


@pytest.mark.parametrize("references", ["text", None, [5, 6], [None], [["a"]], [[2**40]], [[-1]], [[320]]])
def test_bad_references(llm: LLM, references: object) -> None:
    with pytest.raises(errors.InvalidReference, match="reference"):
        llm.generate("def", references=references)  # type: ignore[call-overload]


@pytest.mark.parametrize("prompt", [3, ["a", 3], [1.5]])
def test_bad_prompts(llm: LLM, prompt: object) -> None:
    with pytest.raises(errors.InvalidPrompt):
        llm.generate(prompt)  # type: ignore[call-overload]


def test_requests_start_from_their_own_engine_only(llm: LLM) -> None:
    one, other = Engine(llm.model), Engine(llm.model)
    method = llm.method
    kept = one.submit([5, 6, 7], method, greedy(3), keep=True)
    gone = one.submit([5, 6, 7], method, greedy(3))
    while one.requests:
        one.step()
    for engine, request in ((other, kept), (one, gone)):
        with pytest.raises(errors.InvalidOption, match="start"):
            engine.submit([5, 6, 7, 8], method, start=request)
    again = one.submit([5, 6, 7, 8], method, greedy(3), start=kept)
    assert again.reused == 3
    with pytest.raises(errors.InvalidOption, match="start"):
        one.submit([5, 6, 7, 8], method, start=kept)


def test_a_closed_conversation_holds_no_memory(llm: LLM) -> None:
    talk = Conversation(llm)
    talk.generate("def", max_new_tokens=4)
    pool = talk._engine.pool
    assert pool._buffers()  # type: ignore[attr-defined]
    talk.close()
    assert not pool._buffers()  # type: ignore[attr-defined]


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
