"""The server: a streamed answer is the whole one, which is the library's, which is plain decoding's."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from selfdraft import LLM, SamplingParams
from selfdraft.async_llm import AsyncLLM
from selfdraft.engine.engine import Engine
from selfdraft.engine.request import Request
from selfdraft.engine.scheduler import Limits
from selfdraft.engine.step import Step
from selfdraft.sampling.detokenizer import Detokenizer
from selfdraft.server import generation, guard, prompts, requests, run, serving, time_limit
from selfdraft.server.requests import ResponsesRequest
from selfdraft.server.responses_input import as_chat
from serving import TEMPLATE, Running, served

from conftest import TEXT

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    made = LLM(str(folder))
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def running(llm: LLM) -> Iterator[Running]:
    with served(AsyncLLM.load(llm), names=("tiny", "second"), deadline=60) as it:
        yield it


@pytest.fixture(scope="module")
def apart(folder: Path) -> LLM:
    """The same model with an engine of its own."""
    return LLM(str(folder))


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def joined(events: list[Any], index: int = 0) -> str:
    choices = [c for e in events[:-1] for c in e["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def random_request(seed: int) -> dict[str, Any]:
    """A request of any kind, without what differs between calls."""
    draw = random.Random(seed)
    start = draw.randrange(len(TEXT) - 20)
    body: dict[str, Any] = {
        "prompt": TEXT[start : start + draw.randint(3, 60)],
        "max_tokens": draw.randint(1, 40),
        "temperature": draw.choice([0, 0.7, 1.2]),
        "seed": draw.randrange(1000),
    }
    maybe = {
        "top_p": 0.9,
        "top_k": 20,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "stop": draw.choice([["e"], "re", ["\n", "ret"]]),
        "prediction": {"type": "content", "content": TEXT},
        "logit_bias": {"70": 3.5, "71": -100},
        "min_tokens": 1,
        "logprobs": 2,
        "n": 2,
        "method": draw.choice(["plain", "jacobi"]),
    }
    return body | {name: value for name, value in maybe.items() if draw.random() < 0.3}


def library(llm: LLM, body: dict[str, Any]) -> list[str]:
    """The texts that the library gives for it."""
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    left_out = ("prompt", "prediction", "n", "method", "logit_bias")
    options = {names.get(name, name): value for name, value in body.items() if name not in left_out}
    biases = {int(token): value for token, value in body.get("logit_bias", {}).items()}
    params = SamplingParams.read({**options, "logit_bias": biases})
    n = body.get("n", 1) if params.temperature else 1
    texts = [one.text for one in llm.generate(body["prompt"], params, raw=True, n=n)]
    return texts if params.temperature else texts * body.get("n", 1)


def differing(running: Running, llm: LLM, seeds: range) -> list[int]:
    """Seeds of requests whose texts differ: whole, streamed, the library's, plain decoding's. All in one
    running server at once, with requests that are left in between."""
    plain = llm.using("plain")

    def differs(seed: int) -> bool:
        body = random_request(seed)
        if seed % 5 == 0:
            running.open(COMPLETIONS, **body | {"max_tokens": 200, "stream": True}).close()
        whole = running.post(COMPLETIONS, **body)
        streamed = running.events(COMPLETIONS, **body)
        texts = [choice["text"] for choice in whole["choices"]]
        tokens = [choice["logprobs"] for choice in whole["choices"]]
        parts = [
            c["logprobs"] for e in streamed[:-1] for c in e["choices"] if c["index"] == 0 and c["logprobs"]
        ]
        same = [joined(streamed, index) for index in range(len(texts))] == texts
        same &= tokens[0] is None or [t for part in parts for t in part["tokens"]] == tokens[0]["tokens"]
        return not (same and texts == library(llm, body) and texts == library(plain, body))

    with ThreadPoolExecutor(4) as pool:
        return [seed for seed, wrong in zip(seeds, pool.map(differs, seeds), strict=True) if wrong]


def test_streamed_is_whole_is_library_is_plain(running: Running, apart: LLM) -> None:
    assert differing(running, apart, range(40)) == []


def test_a_planted_fault_in_the_pieces_is_found(
    running: Running, apart: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alone(Detokenizer):
        def add(self, ids: Any, last: bool = False) -> str:
            return Detokenizer(self.tokenizer).add(ids, last=True)

    monkeypatch.setattr(generation, "Detokenizer", Alone)
    assert differing(running, apart, range(12)) != []


def test_a_stream_is_as_openai_says(running: Running) -> None:
    asked = {
        "messages": say("add"),
        "max_tokens": 9,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    events = running.events(CHAT, **asked)
    assert events[-1] == "[DONE]"
    *chunks, last, counted = events[:-1]
    assert len({e["id"] for e in events[:-1]}) == 1
    assert all(e["object"] == "chat.completion.chunk" and e["model"] == "tiny" for e in events[:-1])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(e["usage"] is None for e in (*chunks, last))
    assert all(e["choices"][0]["finish_reason"] is None for e in chunks)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert counted["choices"] == []
    whole = running.post(CHAT, **{k: v for k, v in asked.items() if k != "stream_options"})
    assert counted["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": joined(events),
        "refusal": None,
        "annotations": [],
    }


def test_no_delta_holds_half_a_character(running: Running) -> None:
    for seed in range(6):
        events = running.events(
            COMPLETIONS, prompt="\N{GRINNING FACE}", temperature=2, seed=seed, max_tokens=60
        )
        whole = running.post(COMPLETIONS, prompt="\N{GRINNING FACE}", temperature=2, seed=seed, max_tokens=60)
        assert joined(events) == whole["choices"][0]["text"]


def test_a_prediction_is_drafted_and_counted(running: Running, llm: LLM) -> None:
    asked = {"messages": say("add"), "max_tokens": 40, "temperature": 0}
    alone = running.post(CHAT, **asked)
    text = alone["choices"][0]["message"]["content"]
    for content in (text, [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]):
        helped = running.post(CHAT, **asked, prediction={"type": "content", "content": content})
        assert helped["choices"][0]["message"] == alone["choices"][0]["message"]
        counts = helped["usage"]["completion_tokens_details"]
        figures = helped["selfdraft"]
        assert counts["accepted_prediction_tokens"] == figures["accepted"] > 10
        assert counts["rejected_prediction_tokens"] == figures["drafted"] - figures["accepted"] >= 0
        assert figures["tokens_per_forward"] > alone["selfdraft"]["tokens_per_forward"]
        assert (figures["method"], figures["weights"]) == ("auto", "base")
    empty = running.post(CHAT, **asked, prediction={"type": "content", "content": ""})
    assert set(empty["usage"]["completion_tokens_details"].values()) == {0}


def test_echo_and_lists_of_prompts(running: Running, llm: LLM) -> None:
    ids = list(llm.encode("def add"))
    asked = {"max_tokens": 5, "temperature": 0, "echo": True}
    one = running.post(COMPLETIONS, prompt="def add", **asked)["choices"][0]["text"]
    several = running.post(COMPLETIONS, prompt=["def add", "class"], **asked)["choices"]
    assert [choice["index"] for choice in several] == [0, 1]
    assert several[0]["text"] == one
    assert one.startswith("def add")
    assert running.post(COMPLETIONS, prompt=ids, **asked)["choices"][0]["text"] == one
    assert running.post(COMPLETIONS, prompt=[ids, ids], **asked)["choices"][1]["text"] == one
    assert joined(running.events(COMPLETIONS, prompt="def add", **asked)) == one


def test_log_probabilities(running: Running) -> None:
    asked = {"messages": say("add"), "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = running.post(CHAT, **asked)["choices"][0]
    content = whole["logprobs"]["content"]
    assert len(content) == 12
    assert (
        b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
        == (whole["message"]["content"])
    )
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)  # greedy
    events = running.events(CHAT, **asked)
    parts = [e["choices"][0]["logprobs"] for e in events[:-1] if e["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == content


def test_tokenize_and_back(running: Running, llm: LLM) -> None:
    made = running.post("/tokenize", prompt="def add", return_token_strs=True)
    assert made["tokens"] == list(llm.encode("def add"))
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert running.post("/v1/detokenize", tokens=made["tokens"])["prompt"] == "<|bos|>def add"
    chat = running.post("/v1/tokenize", messages=say("add"))["tokens"]
    assert chat == list(llm.prompt_ids(None, say("add")))


def test_models_and_health(running: Running) -> None:
    _, models, _ = running.request("GET", "/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny", "second"]
    assert running.request("GET", "/models/second")[1]["id"] == "second"
    assert running.request("GET", "/v1/models/other")[1]["error"]["code"] == "model_not_found"
    assert running.request("GET", "/health")[:2] == (200, {"status": "ok"})
    assert "<html" in running.request("GET", "/")[1]
    running.post(COMPLETIONS, prompt="def", max_tokens=1)
    page = running.request("GET", "/metrics")[1]
    assert 'selfdraft_requests_total{endpoint="completions",outcome="answered"}' in page
    assert "selfdraft_generated_tokens_total" in page
    assert "selfdraft_accepted_tokens_total{source=" in page


def metrics(running: Running) -> dict[str, float]:
    """Values by name; those of all labels added up under the name alone."""
    lines = running.request("GET", "/metrics")[1].splitlines()
    values = {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}
    for name in [name for name in values if "{" in name]:
        family = name.split("{")[0]
        values[family] = values.get(family, 0.0) + values[name]
    return values


def test_metrics_count_rows_and_sources(fresh: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request's drafter says that 3 of its draft tokens are copies, of which 1 was accepted."""
    observe = Request.observe

    def counted(self: Request, step: Step, mask_logits: Any) -> None:
        observe(self, step, mask_logits)
        self.sources = {"copies": SimpleNamespace(drafted=3, accepted=1)}  # type: ignore[attr-defined]

    with served(AsyncLLM.load(fresh)) as running:
        asked = {"prompt": TEXT[:60], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        text = running.post(COMPLETIONS, **asked, method="plain")["choices"][0]["text"]
        before = metrics(running)
        monkeypatch.setattr(Request, "observe", counted)
        made = running.post(COMPLETIONS, **asked, references=[text])
        after = metrics(running)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    usage, figures = made["usage"], made["selfdraft"]
    read = usage["prompt_tokens"] - 1 - usage["prompt_tokens_details"]["cached_tokens"]
    decoded = usage["completion_tokens"] - figures["accepted"] + figures["drafted"]
    assert gained["selfdraft_step_rows_sum"] == read + decoded
    assert after["selfdraft_step_rows_count"] == after["selfdraft_step_seconds_count"]
    for what, copies in (("drafted", 3), ("accepted", 1)):
        assert gained[f"selfdraft_{what}_tokens_total"] == figures[what] > copies
        assert gained[f'selfdraft_{what}_tokens_total{{source="copies"}}'] == copies


WRONG: list[tuple[str, dict[str, Any], int, str | None]] = [
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": say("a"), "model": None}, 400, "model"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"content": "a"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    (CHAT, {"messages": say("a"), "model": "other"}, 404, "model"),
    (CHAT, {"messages": say("a"), "n": 0}, 400, "n"),
    (CHAT, {"messages": say("a"), "seed": "7"}, 400, "seed"),
    (CHAT, {"messages": say("a"), "seed": 1.5}, 400, "seed"),
    (CHAT, {"messages": say("a"), "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"messages": say("a"), "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"messages": say("a"), "stop": ["x"] * 100}, 400, "stop"),
    (CHAT, {"messages": say("a"), "stop": [""]}, 400, "stop"),
    (CHAT, {"messages": say("a"), "temperature": -1}, 400, "temperature"),
    (CHAT, {"messages": say("a"), "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": say("a"), "logit_bias": {"999": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": say("a"), "method": "nothing"}, 400, "method"),
    (CHAT, {"messages": say("a"), "method": "bita"}, 400, "method"),
    (CHAT, {"messages": say("a"), "max_tokens": 5, "min_tokens": 9}, 400, "min_tokens"),
    (CHAT, {"messages": say("a"), "use_beam_search": True}, 400, "use_beam_search"),
    (CHAT, {"messages": say("a"), "chat_template_kwargs": {"colour": 1}}, 400, "chat_template_kwargs"),
    (CHAT, {"messages": say("a"), "chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs"),
    (CHAT, {"messages": say("a"), "reasoning_effort": "high"}, 400, "reasoning_effort"),
    (CHAT, {"messages": say("a"), "continue_final_message": True}, 400, "messages"),
    (CHAT, {"messages": say("a"), "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": say("a"), "prediction": {"type": "text", "content": ""}}, 400, "prediction.type"),
    (
        CHAT,
        {"messages": say("a"), "prediction": {"type": "content", "content": "a" * 10**6}},
        400,
        "prediction",
    ),
    (CHAT, {"messages": say("a"), "references": ["a"] * 33}, 400, "references"),
    (CHAT, {"messages": say("\ud800")}, 400, "messages"),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1, 2, 999]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo"),
    (COMPLETIONS, {"prompt": ["a"] * 100, "n": 2}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    (CHAT, {"messages": say("a"), "guided_regex": "("}, 400, "guided_regex"),
    (CHAT, {"messages": say("a"), "guided_grammar": "start: nothing"}, 400, "guided_grammar"),
    (
        CHAT,
        {"messages": say("a"), "guided_regex": "a", "guided_grammar": 'start: "a"'},
        400,
        "guided_grammar",
    ),
    (CHAT, {"messages": say("a"), "guided_regex": "a", "min_tokens": 2}, 400, "min_tokens"),
    (CHAT, {"messages": say("a"), "response_format": {"type": "json_schema"}}, 400, "response_format"),
    ("/v1/responses", {"input": ""}, 400, "input"),
    ("/v1/responses", {"input": "a", "previous_response_id": "x"}, 400, "previous_response_id"),
    ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}, 400, "tools"),
    ("/v1/responses", {"input": "a", "tool_choice": "required"}, 400, "tool_choice"),
    (
        "/v1/responses",
        {"input": [{"type": "function_call_output", "call_id": "x", "output": "a"}]},
        400,
        "input.0",
    ),
    ("/v1/responses", {"input": [{"type": "function_call", "call_id": "x"}]}, 400, "input.0"),
    ("/v1/detokenize", {"tokens": [-1]}, 400, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused_by_name(
    running: Running, path: str, body: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    more = {"stream": True} if stream else {}
    got, answer, _ = running.request("POST", path, {"model": "tiny", **body, **more})
    assert got == status
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert str(error["param"]).split(".")[: len(str(param).split("."))] == str(param).split(".")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context(running: Running, stream: bool) -> None:
    body = {"model": "tiny", "prompt": [5] * 300, "stream": stream}
    status, answer, _ = running.request("POST", COMPLETIONS, body)
    assert status == 400
    assert answer["error"]["type"] == "exceed_context_size_error"
    assert (answer["error"]["n_prompt_tokens"], answer["error"]["n_ctx"]) == (300, 256)


def test_options_of_streams_need_a_stream(running: Running) -> None:
    status, answer, _ = running.request(
        "POST", CHAT, {"model": "tiny", "messages": say("a"), "stream_options": {}}
    )
    assert (status, answer["error"]["param"]) == (400, "stream_options")


def test_fields_without_effect_and_unknown_ones(running: Running, llm: LLM) -> None:
    asked = {"messages": say("a"), "max_tokens": 3, "temperature": 0}
    harmless = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "skip_special_tokens": True,
        "suffix": None,
    }
    texts = {
        running.post(CHAT, **asked, **more)["choices"][0]["message"]["content"]
        for more in ({}, harmless, {"something_new": 1})
    }
    assert len(texts) == 1
    with served(AsyncLLM.load(llm), strict=True) as strict:
        named = {"model": strict.serving.names[0], **asked}
        assert strict.request("POST", CHAT, {**named, **harmless})[0] == 200
        status, answer, _ = strict.request("POST", CHAT, {**named, "something_new": 1})
        assert (status, answer["error"]["param"]) == (400, "something_new")


def test_a_stop_string_may_be_a_special_token(running: Running) -> None:
    asked = {"prompt": "def", "max_tokens": 30, "temperature": 0, "logit_bias": {"1": 50}}
    assert running.post(COMPLETIONS, **asked, stop=["<|eos|>"])["choices"][0]["finish_reason"] == "stop"


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def slow(self: Engine) -> None:
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(Engine, "step", slow)


@pytest.fixture
def fresh(folder: Path) -> LLM:
    """One whose engine nobody else uses."""
    made = LLM(str(folder))
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_leaves_frees_its_request(fresh: LLM) -> None:
    slow = AsyncLLM.load(fresh)
    with served(slow) as running:
        for stream in (True, False):
            gone = running.open(CHAT, messages=say("a"), max_tokens=200, n=2, stream=stream, ignore_eos=True)
            assert until(lambda: slow.stats.running == 2)
            gone.close()
            assert until(lambda: slow.stats.running == 0, 4.0)


@pytest.mark.usefixtures("slow_steps")
def test_a_full_queue(folder: Path) -> None:
    narrow = LLM(str(folder), limits=Limits(max_requests=1, max_queue=1))
    narrow.tokenizer.chat_template = TEMPLATE
    slow = AsyncLLM.load(narrow)
    with served(slow) as running:
        name = running.serving.names[0]
        asked = {"model": name, "messages": say("a"), "max_tokens": 100, "ignore_eos": True}
        status, answer, headers = running.request("POST", CHAT, {**asked, "n": 3, "stream": True})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert until(lambda: slow.stats.running == 0)  # the two that fitted are not left running
        assert running.request("POST", CHAT, {**asked, "max_tokens": 2})[0] == 200


def test_keys(llm: LLM) -> None:
    with served(AsyncLLM.load(llm), api_keys=("one", "zwei\N{SNOWMAN}")) as running:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert running.request("GET", path)[0] == 401
            assert running.request("GET", path, headers={"Authorization": "Bearer two"})[0] == 401
            assert running.request("GET", path, headers={"Authorization": "Basic one"})[0] == 401
            assert running.request("GET", path, headers={"Authorization": "Bearer one"})[0] == 200
        status, answer, _ = running.request("POST", CHAT, {"messages": say("a")})
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert running.request("GET", "/health")[0] == 200


def drafted_by_key(folder: Path) -> list[float]:
    """Draft tokens that a server takes from earlier answers, when one text is asked for with a key, with
    another key and another salt, which have answers of another text, and with the first key again."""
    kept = LLM(str(folder), limits=Limits(earlier_answers=1000))
    with served(AsyncLLM.load(kept), api_keys=("one", "two")) as running:

        def ask(key: str, salt: str | None, prompt: str) -> float:
            name = 'selfdraft_drafted_tokens_total{source="answer"}'
            headers = {"Authorization": f"Bearer {key}"}
            body = {"model": running.serving.names[0], "prompt": prompt, "temperature": 0, "max_tokens": 40}
            if salt is not None:
                body["cache_salt"] = salt
            assert running.request("POST", COMPLETIONS, body, headers)[0] == 200
            page = running.request("GET", "/metrics", headers=headers)[1]
            counts = [float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name)]
            return sum(counts)

        ask("two", None, "class Stack:")
        ask("one", "salt", "class Stack:")
        before = ask("one", None, "class Stack:")
        rest = (("one", None), ("two", None), ("one", "salt"), ("one", None))
        return [ask(key, salt, "def add(") - before for key, salt in rest]


def test_keys_and_salts_share_no_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other_key, other_salt, same = drafted_by_key(folder)
    assert first == other_key == other_salt == 0 < same
    monkeypatch.setattr(serving, "tenant", lambda headers, salt: salt or "")
    assert drafted_by_key(folder)[1] > 0
    monkeypatch.setattr(serving, "tenant", lambda headers, salt: headers["authorization"])
    found = drafted_by_key(folder)
    assert found[1] == 0 < found[2]


def test_hosts(running: Running) -> None:
    def status(host: str) -> int:
        return running.request("GET", "/v1/models", headers={"Host": host})[0]

    assert [status(host) for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "")] == [
        403
    ] * 4
    assert [status(host) for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:80", "10.0.0.3")] == [
        200
    ] * 5


def test_origins(llm: LLM) -> None:
    with served(AsyncLLM.load(llm), cors_origins=("http://one.example",), api_keys=("k",)) as running:
        asks = {"Access-Control-Request-Method": "POST"}
        allowed = running.request("OPTIONS", CHAT, headers={"Origin": "http://one.example", **asks})
        assert (allowed[0], allowed[2]["access-control-allow-origin"]) == (200, "http://one.example")
        assert running.request("OPTIONS", CHAT, headers={"Origin": "http://two.example", **asks})[0] == 400


def test_bodies_that_are_none(running: Running, llm: LLM) -> None:
    for body in (
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b"null",
        b'{"a": NaN}',
        b"7",
    ):
        status, answer, _ = running.request("POST", CHAT, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:20]
    with served(AsyncLLM.load(llm), max_body=1_000) as small:
        status, answer, _ = small.request("POST", CHAT, b" " * 2_000)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        assert small.post(CHAT, messages=say("a"), max_tokens=2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*requests.ChatRequest.model_fields, *requests.CompletionRequest.model_fields})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses", "/v1/tokenize", "/v1/detokenize"])
def test_no_body_breaks_the_server(running: Running, path: str) -> None:
    base = {
        "model": "tiny",
        "messages": say("a"),
        "prompt": "a",
        "input": "a",
        "tokens": [5],
        "max_tokens": 2,
    }

    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
    @hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    def check(changed: dict[str, Any]) -> None:
        body = {**base, **changed}
        if path != "/v1/tokenize" and "max_tokens" not in changed:
            body["max_output_tokens"] = 2
        status, answer, _ = running.request("POST", path, body)
        assert status in (200, 400, 404), (body, answer)

    check()


def test_a_head_that_does_not_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)
    with served(AsyncLLM.load(llm)) as running:
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            with socket.create_connection(("127.0.0.1", running.port), timeout=5) as late:
                late.sendall(begun)
                assert late.recv(100) == b""
        assert running.request("GET", "/health")[0] == 200


def test_a_body_that_does_not_end(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as late:
        late.sendall(head)
        assert late.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_slow_reader_holds_nobody(running: Running) -> None:
    slow = running.open(
        COMPLETIONS, prompt="a", max_tokens=200, n=20, stream=True, temperature=1, logprobs=20
    )
    try:
        asked = {"prompt": "def", "max_tokens": 5, "temperature": 0}
        assert running.post(COMPLETIONS, **asked)["usage"]["completion_tokens"] > 0
    finally:
        slow.close()


@pytest.mark.usefixtures("slow_steps")
def test_the_end_of_the_server(fresh: LLM) -> None:
    slow = AsyncLLM.load(fresh)
    with served(slow, grace=0.2) as running, ThreadPoolExecutor(1) as pool:
        asked = {"messages": say("a"), "max_tokens": 200, "ignore_eos": True}
        under_way = pool.submit(running.events, CHAT, **asked)
        assert until(lambda: slow.stats.running == 1)
        running.server.should_exit = True
        events = under_way.result(20)
        assert events[-2]["choices"][0]["finish_reason"] == "abort"
        assert joined(events)


def test_templates_have_a_limit_in_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", endless)
    with served(AsyncLLM.load(llm)) as running:
        asked = {"model": running.serving.names[0], "messages": say("a")}
        status, answer, _ = running.request("POST", CHAT, asked)
        assert status == 400
        assert "template took more than" in answer["error"]["message"]
        assert running.request("GET", "/health")[0] == 200


def test_templates_run_in_a_sandbox(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        llm.tokenizer, "chat_template", "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )
    with served(AsyncLLM.load(llm)) as running:
        asked = {"model": running.serving.names[0], "messages": say("a")}
        status, answer, _ = running.request("POST", CHAT, asked)
        assert status == 400
        assert "unsafe" in answer["error"]["message"]


def test_work_over_its_time_ends() -> None:
    rounds = 0

    def work() -> None:
        nonlocal rounds
        while True:
            rounds += 1

    with pytest.raises(TimeoutError):
        time_limit.within(0.1, work)
    time.sleep(0.2)
    before = rounds
    time.sleep(0.1)
    assert rounds == before
    assert time_limit.within(1, lambda: 7) == 7


def test_reasoning_is_told_apart(running: Running, llm: LLM) -> None:
    asked = {"messages": say("a"), "max_tokens": 12, "temperature": 0}
    opened = running.post(CHAT, **asked, chat_template_kwargs={"enable_thinking": True})
    message = opened["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    events = running.events(CHAT, **asked, chat_template_kwargs={"enable_thinking": True})
    deltas = [choice["delta"] for event in events[:-1] for choice in event["choices"]]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == message["reasoning_content"]


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


def test_answers_follow_a_grammar(running: Running) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for grammar in ({"response_format": form}, {"guided_regex": "(yes|no), [a-z]{1,9}"}):
        asked = {"messages": say("a"), "max_tokens": 60, "temperature": 1, "seed": 5, **grammar}
        whole = running.post(CHAT, **asked)["choices"][0]
        text = whole["message"]["content"]
        if "response_format" in grammar and whole["finish_reason"] == "stop":
            assert isinstance(json.loads(text)["a"], int)
        assert joined(running.events(CHAT, **asked)) == text
        plain = running.post(CHAT, **asked, method="plain", prediction={"type": "content", "content": text})
        assert plain["choices"][0]["message"]["content"] == text
    assert text.startswith(("yes, ", "no, "))


def test_a_tool_that_must_be_called_is(running: Running) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    asked = {"messages": say("a"), "max_tokens": 90, "temperature": 0, "tools": [TOOL]}
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        chosen = running.post(CHAT, **asked, tool_choice=choice)["choices"][0]
        assert chosen["finish_reason"] == "tool_calls"
        (call,) = chosen["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
        assert isinstance(json.loads(call["function"]["arguments"])["a"], int)
    events = running.events(CHAT, **asked, tool_choice="required")
    deltas = [d for e in events[:-1] for c in e["choices"] for d in c["delta"].get("tool_calls", [])]
    assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
    assert running.post(CHAT, **asked, tool_choice="none")["choices"][0]["message"].get("tool_calls") is None


def test_responses(running: Running) -> None:
    asked = {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "add"}]}],
        "temperature": 0,
    }
    events = running.events("/v1/responses", **asked, max_output_tokens=6)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    whole = running.post("/v1/responses", **asked, max_output_tokens=6)
    text = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert whole["output"][0]["content"][0]["text"] == text
    chat = running.post(CHAT, messages=say("add"), temperature=0, max_tokens=6)
    assert chat["choices"][0]["message"]["content"] == text
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["usage"]["output_tokens"] == 6


FLAT_TOOL = {"type": "function", **TOOL["function"]}
"""As the Responses API has it."""


def test_tools_in_responses(running: Running) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    asked = {"input": "a", "temperature": 0, "tools": [FLAT_TOOL]}
    chat = running.post(
        CHAT, messages=say("a"), temperature=0, tools=[TOOL], max_tokens=90, tool_choice="required"
    )
    right = chat["choices"][0]["message"]["tool_calls"][0]["function"]
    for choice in ("required", {"type": "function", "name": "add"}):
        whole = running.post("/v1/responses", **asked, tool_choice=choice, max_output_tokens=90)
        (call,) = whole["output"]
        assert (call["type"], call["status"], whole["status"]) == ("function_call", "completed", "completed")
        assert (call["name"], call["arguments"]) == ("add", right["arguments"])
        assert whole["tool_choice"] == choice
        assert whole["tools"][0]["name"] == "add"
    events = running.events("/v1/responses", **asked, tool_choice="required", max_output_tokens=90)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    assert events[2]["item"]["arguments"] == ""
    assert events[3]["delta"] == events[4]["arguments"] == right["arguments"]
    assert events[-1]["response"]["output"] == [events[5]["item"]]
    free = running.post("/v1/responses", **asked, tool_choice="none", max_output_tokens=5)
    assert free["output"][0]["type"] == "message"


def test_what_was_called_goes_on_as_in_a_chat(running: Running) -> None:
    """The output of one request and what the function returned are the input of the next."""
    call = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So:"}]}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    output = {"type": "function_call_output", "call_id": "c1", "output": "3"}
    items = [{"role": "user", "content": "a"}, thought, said, call, output]
    function = {"name": "add", "arguments": '{"a": 1}'}
    turn = {"role": "assistant", "content": "So:", "tool_calls": [{"id": "c1", "function": function}]}
    messages = [*say("a"), turn, {"role": "tool", "tool_call_id": "c1", "content": "3"}]
    same = {"temperature": 0}
    chat = running.post(CHAT, messages=messages, max_tokens=8, tools=[TOOL], **same)
    response = running.post("/v1/responses", input=items, max_output_tokens=8, tools=[FLAT_TOOL], **same)
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert response["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    (turn_of_it,) = [m for m in as_chat(ResponsesRequest(model="m", input=items)).messages if m.tool_calls]
    assert turn_of_it.model_dump()["reasoning_content"] == "hm"
    assert turn_of_it.content == "So:"


def test_clients_of_openai(running: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "second"]
    asked: dict[str, Any] = {"model": "tiny", "messages": say("add"), "temperature": 0, "max_tokens": 30}
    answer = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    text = answer.choices[0].message.content
    assert text == answer.choices[1].message.content
    assert len(answer.choices[0].logprobs.content) == 30
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text
    helped = client.chat.completions.create(**asked, prediction={"type": "content", "content": text})
    assert helped.usage.completion_tokens_details.accepted_prediction_tokens > 0
    plain = client.chat.completions.create(**asked, extra_body={"method": "plain"})
    assert plain.choices[0].message.content == helped.choices[0].message.content == text
    raw = client.completions.create(model="tiny", prompt="def", max_tokens=4, temperature=0, echo=True)
    assert raw.choices[0].text.startswith("def")
    response = client.responses.create(model="tiny", input="add", temperature=0, max_output_tokens=30)
    assert response.output_text == text
    with client.responses.stream(model="tiny", input="add", temperature=0, max_output_tokens=30) as events:
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**asked | {"temperature": -1})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked | {"model": "other"})


FIM_STOPS = [
    *(
        "<|endoftext|>",
        "<|file_separator|>",
        "<|fim_pad|>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
    ),
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<PRE>", "<SUF>", "<MID>", "[PREFIX]", "[SUFFIX]"),
]
"""What Zed sends with a request for an edit prediction."""


def test_requests_as_editors_send_them(running: Running) -> None:
    """Zed: a prompt with both sides of the cursor. Continue: an edit, streamed from /v1/completions, with the
    old code as the prediction."""
    prompt = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n<|fim_middle|>"
    zed = running.post(COMPLETIONS, prompt=prompt, max_tokens=64, stop=FIM_STOPS)
    assert isinstance(zed["choices"][0]["text"], str)
    assert zed["id"]
    asked = {"prompt": "rewrite:\n```python\n", "max_tokens": 40, "temperature": 0}
    text = running.post(COMPLETIONS, **asked)["choices"][0]["text"]
    events = running.events(COMPLETIONS, **asked, prediction={"type": "content", "content": text})
    assert joined(events) == text
    assert events[-2]["selfdraft"]["accepted"] > 10


def test_the_openapi_page_names_the_endpoints(running: Running) -> None:
    _, page, _ = running.request("GET", "/openapi.json")
    assert {CHAT, COMPLETIONS, "/v1/responses", "/v1/tokenize"} <= set(page["paths"])
    assert json.dumps(page)
