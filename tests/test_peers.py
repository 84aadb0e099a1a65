"""Other inference engines: counted like all arms, in processes that end with the bench and lose no answers.
GGUF files hold every weight of the model that they were made from."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import selfdraft
from selfdraft import LLM
from selfdraft._common import machine
from selfdraft.bench import arm, measure, peer, source, stored, suite
from selfdraft.bench.arm import Answer, External
from selfdraft.bench.job import Job
from selfdraft.bench.journal import Journal
from selfdraft.bench.measure import Bench, plan
from selfdraft.bench.peer import EngineProcess, Peer
from selfdraft.bench.peers import gguf_folder
from selfdraft.errors import BenchError, InvalidOption, PeerFailed, PeerUnavailable
from selfdraft.models.loading import EMBEDDED

from conftest import VOCABULARY, Run, tiny_llama

pytestmark = pytest.mark.usefixtures("quick_machine")

PROMPT = [5, 6, 7, 8]
SETTINGS = {"model": "none", "dtype": "float32", "threads": 1, "context": 64, "lookup": 2, "ngram": ""}
ENGINE = '''
import os, sys, time

def versions():
    return {"fake": "1"}

class Engine:
    def __init__(self, settings):
        self.width = settings["lookup"] + 1
        print("loaded")

    def steps(self, prompt, length, eos):
        """Reads the prompt in two steps; then each step runs so many rows and one more, and is right in all;
        its first token comes by itself."""
        print("asked")
        token = prompt[-1]
        yield [], len(prompt) - 2
        rows, count = 2, 1
        while True:
            tokens = []
            for _ in range(count):
                token = (token * 5 + 1) % 293
                tokens.append(token)
            yield tokens[:1], rows
            if tokens[1:]:
                yield tokens[1:], 0
            rows = count = self.width
'''


def said(count: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """What the engine says, token by token."""
    token, out = prompt[-1], []
    for _ in range(count):
        token = (token * 5 + 1) % 293
        out.append(token)
    return out


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of worker programs whose llama.cpp is the engine above."""
    path = tmp_path / "peers"
    path.mkdir()
    for name in ("worker.py", "gguf_folder.py"):
        shutil.copy(peer.HERE / name, path)
    (path / "llamacpp.py").write_text(ENGINE)
    monkeypatch.setattr(peer, "HERE", path)
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture
def made() -> Iterator[Callable[..., Peer]]:
    """Makes peers, and closes them."""
    peers: list[Peer] = []

    def make(eos: Sequence[int] = (), **settings: Any) -> Peer:
        one = Peer("llamacpp", "llamacpp", sys.executable, {**SETTINGS, **settings}, frozenset(eos))
        peers.append(one)
        return one

    yield make
    for one in peers:
        one.close()


def is_running(one: EngineProcess) -> bool:
    return one.process.poll() is None


# The protocol


def counted(answer: Answer) -> tuple[list[int], ...]:
    return (list(answer.ids), list(answer.runs), list(answer.rows))


def told(made: Callable[..., Peer]) -> list[tuple[list[int], ...]]:
    """Answers cut by length and by an end, at several places in a step."""
    ends = ([], *([said(6)[at]] for at in (4, 2, 0)))
    return [counted(made(eos).answer(PROMPT, [], 6)) for eos in ends]


def test_answers_are_counted_as_all_are(workers: Path, made: Callable[..., Peer]) -> None:
    ids = said(6)
    assert told(made) == [
        (ids, [1, 3, 2], [1, 3, 3]),
        (ids[:5], [1, 3, 1], [1, 3, 3]),
        (ids[:3], [1, 2], [1, 3]),
        (ids[:1], [1], [1]),
    ]
    one = made()
    first, again = one.answer(PROMPT, [[1]], 6), one.answer(PROMPT, [], 6)
    assert counted(first) == counted(again)
    assert list(first.times) == sorted(first.times)
    assert first.peak is not None
    assert first.peak > 1_000_000
    assert made(lookup=0).answer(PROMPT, [], 6).runs == [1] * 6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    os.dup2(2, 1)\n", ""),
        ("ran = 1 - len(prompt)", "ran = 1"),
        ("ran += more", "ran = more"),
        ("if more or not runs:", "if True:"),
        ("tokens[: min(left, end)]", "tokens[:left]"),
        ("tokens[: min(left, end)]", "tokens[:end]"),
    ],
)
def test_each_fault_of_a_worker_is_seen(old: str, new: str, workers: Path, made: Callable[..., Peer]) -> None:
    right = told(made)
    change(workers / "worker.py", old, new)
    try:
        wrong = told(made)
    except PeerFailed:
        return
    assert wrong != right


def test_a_peer_says_what_it_took(workers: Path, made: Callable[..., Peer]) -> None:
    """Its seconds and its memory, of this answer: they are not ours."""
    change(
        workers / "llamacpp.py",
        'print("asked")',
        "until = time.process_time() + 0.2\n"
        "        while time.process_time() < until: pass\n"
        "        held = bytearray(b'x') * (100_000_000 if length > 1 else 1)",
    )
    one = made()
    large, small = one.answer(PROMPT, [], 6), one.answer(PROMPT, [], 1)
    assert 0.2 <= small.spent < 5
    assert large.times[0] >= 0.2
    assert large.peak is not None
    assert large.peak > 100_000_000
    assert small.peak is not None
    assert small.peak < 100_000_000 or not sys.platform.startswith("linux")


# What goes wrong


def test_an_engine_that_is_not_there(workers: Path, made: Callable[..., Peer]) -> None:
    (workers / "llamacpp.py").write_text("def versions():\n    import no_such_engine\n")
    with pytest.raises(
        PeerUnavailable, match=r"No module named 'no_such_engine'.*-m pip install llama-cpp-p"
    ):
        made().answer(PROMPT, [], 6)
    with pytest.raises(PeerUnavailable, match=r"--peer-python llamacpp=PATH"):
        peer.versions({"llamacpp": External("llamacpp")}, {})
    with pytest.raises(PeerUnavailable, match=r"no-such-python cannot be run \(No such file"):
        peer.versions({"llamacpp": External("llamacpp")}, {"llamacpp": str(workers / "no-such-python")})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('print("loaded")', "raise RuntimeError('no such weights')", "no such weights"),
        (
            'print("asked")',
            "print('out of memory'); sys.stdout.flush(); os._exit(7)",
            r"code 7\).*out of memory",
        ),
        ('print("asked")', "os._exit(7)", r"code 7\); end of its standard error: loaded"),
        ('print("asked")', "os.close(1); os.kill(os.getpid(), 9)", r"code -9\)"),
        ("yield tokens[:1], rows", "return", "it wrote .* which is not a valid answer"),
    ],
)
def test_a_process_that_ends(old: str, new: str, says: str, workers: Path, made: Callable[..., Peer]) -> None:
    change(workers / "llamacpp.py", old, new)
    one = made()
    with pytest.raises(PeerFailed, match=f"llamacpp: .*{says}.*finished answers are kept"):
        one.answer(PROMPT, [], 6)


def test_a_process_that_is_stuck(
    workers: Path, made: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(workers / "llamacpp.py", 'print("asked")', "time.sleep(60)")
    one = made()
    one.process, _ = peer.opened("llamacpp", "llamacpp", sys.executable, SETTINGS)
    monkeypatch.setattr(peer, "TIMEOUT", 0.3)
    with pytest.raises(
        PeerFailed, match=r"llamacpp: it wrote nothing for 0.3 s; end of its standard error: loaded"
    ):
        one.answer(PROMPT, [], 6)
    assert not is_running(one.process)


def test_a_process_ends_with_a_start_that_is_broken_off(
    workers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[EngineProcess] = []

    def interrupt(process: EngineProcess) -> dict[str, Any]:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(EngineProcess, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        peer.opened("llamacpp", "llamacpp", sys.executable, SETTINGS)
    assert not is_running(started[0])


@pytest.mark.parametrize("line", ["what?", "[1]", '{"ids": [1]}', '{"ready": 1}'])
def test_nonsense(line: str, workers: Path, made: Callable[..., Peer]) -> None:
    (workers / "worker.py").write_text(f"print({line!r}, flush=True)\ninput()\n")
    with pytest.raises(
        PeerFailed, match=r"it wrote .* which is not a valid answer; its standard error is empty"
    ):
        made().answer(PROMPT, [], 6)


RIGHT = {"ids": [3, 4], "runs": [1, 1], "rows": [1, 2], "times": [0.1, 0.2], "peak": 9, "spent": 0.1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": None},
        {"ids": [3, "x"]},
        {"ids": [3]},
        {"runs": [2, 0]},
        {"runs": [2]},
        {"rows": [1]},
        {"times": [0.2, 0.1]},
        {"times": [-0.1, 0.1]},
        {"spent": None},
        {"peak": "much"},
        {"ids": [], "runs": [], "rows": [], "times": []},
    ],
)
def test_what_is_no_answer(wrong: dict[str, Any]) -> None:
    assert peer.parsed(RIGHT) == Answer([3, 4], [1, 1], [1, 2], [0.1, 0.2], peak=9, spent=0.1)
    assert peer.parsed({**RIGHT, **wrong}) is None
    assert peer.parsed({}) is None


@pytest.mark.parametrize("fault", [False, True])
def test_a_process_ends_with_its_bench(fault: bool, workers: Path) -> None:
    """Also in the middle of an answer, when nobody is left to close it; but not with a Ctrl-C that is for
    the bench, which closes it in its own time."""
    change(workers / "llamacpp.py", 'print("asked")', "time.sleep(60)")
    if fault:
        change(workers / "worker.py", "os.killpg(0, signal.SIGKILL)", "return")
    one, _ = peer.opened("llamacpp", "llamacpp", sys.executable, SETTINGS)
    assert os.getpgid(one.process.pid) != os.getpgid(0)
    assert one.process.stdin is not None
    one.process.stdin.write(json.dumps({"prompt": PROMPT, "length": 6, "eos": []}) + "\n")
    one.process.stdin.close()
    if fault:
        with pytest.raises(subprocess.TimeoutExpired):
            one.process.wait(0.5)
    else:
        assert one.process.wait(10) == -signal.SIGKILL
    one.close()
    assert not is_running(one)


# In the bench


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return selfdraft.LLM(str(folder), "plain", dtype="float32")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def a():\n", "class B:\n")))
    return path


def bench(llm: LLM, mine: Path, out: Path, *peers: Peer) -> Bench:
    work = plan(source.from_files(suite.own(mine), [mine]), llm, 100, 6)
    plain = arm.drafted([], llm, selfdraft.SamplingParams())
    return Bench(llm, [*plain, *peers], [work], 2, Journal(out, {"what": "a test"}))


@pytest.fixture
def running(workers: Path, made: Callable[..., Peer], llm: LLM, mine: Path, tmp_path: Path) -> Bench:
    """Ready to run, with a peer as its last arm."""
    return bench(llm, mine, tmp_path / "out", made())


def test_a_run_goes_on_where_a_process_died(
    workers: Path, made: Callable[..., Peer], llm: LLM, mine: Path, tmp_path: Path
) -> None:
    whole = bench(llm, mine, tmp_path / "whole", made())
    whole.run()
    change(workers / "llamacpp.py", 'print("loaded")', "self.left = 3")
    change(workers / "llamacpp.py", 'print("asked")', "self.left -= 1; self.left or os._exit(3)")
    parts = bench(llm, mine, tmp_path / "parts", made())
    with pytest.raises(PeerFailed, match="code 3"):
        parts.run()
    assert 0 < len(parts.journal.records) < whole.answers()
    (workers / "llamacpp.py").write_text(ENGINE)
    parts = bench(llm, mine, tmp_path / "parts", made())
    parts.run()
    assert parts.journal.found > 0
    assert {k: r.ids for k, r in parts.journal.records.items()} == {
        k: r.ids for k, r in whole.journal.records.items()
    }


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, BenchError])
@pytest.mark.parametrize("fault", [False, True])
def test_processes_end_with_the_run(
    end: type[BaseException] | None, fault: bool, running: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = running.arms[-1]
    assert isinstance(one, Peer)
    processes: list[EngineProcess] = []

    def tell(key: object) -> None:
        assert one.process is not None
        processes.append(one.process)
        if end is not None:
            raise end

    with monkeypatch.context() as patch:
        if fault:
            patch.setattr(Peer, "close", lambda self: None)
        if end is None:
            running.run(tell)
        else:
            with pytest.raises(end):
                running.run(tell)
    assert {is_running(process) for process in processes} == {fault}


@pytest.mark.parametrize("fault", [False, True])
def test_its_seconds_are_not_background(fault: bool, running: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 seconds that the machine worked meanwhile 1 was ours and 7 the peer's."""
    read = iter([machine.Clock(100, 10, 0), machine.Clock(109, 11, 1)] * 100)
    monkeypatch.setattr(machine.Clock, "read", lambda: next(read))
    parsed = peer.parsed
    took: dict[str, Any] = {"peak": 123} | ({} if fault else {"spent": 7.0})
    monkeypatch.setattr(peer, "parsed", lambda said: parsed({**said, "spent": 0.0, **took}))
    running.run()
    kept = {(r.arm, r.others, r.peak == 123) for r in running.journal.records.values()}
    assert kept == {("plain", 8.0, False), ("llamacpp", 8.0 if fault else 1.0, True)}


def test_more_than_all_was_not_taken() -> None:
    """Clocks are coarse: nothing is less than none."""
    before, after = machine.Clock(100, 10, 0), machine.Clock(101, 10, 1)
    assert measure._background(before, after, Answer([1], [1], [1], [1.0], spent=1.01)) == 0
    assert measure._background(None, after, Answer([1], [1], [1], [1.0])) is None


# What can be asked for


def test_names_of_peers() -> None:
    names = ["generate", "llamacpp", "lookup-5", "llamacpp-lookup-10", "vllm", "vllm-ngram-7"]
    assert arm.externals([*names, "llamacpp-stored", "llamacpp-stored-lookup-4"]) == {
        "llamacpp": External("llamacpp"),
        "llamacpp-lookup-10": External("llamacpp", 10),
        "vllm": External("vllm"),
        "vllm-ngram-7": External("vllm", 7),
        "llamacpp-stored": External("llamacpp", stored=True),
        "llamacpp-stored-lookup-4": External("llamacpp", 4, stored=True),
    }
    sized = "ngram-map-k4v:size-n=4,size-m=16"
    assert arm.externals(
        ["llama-server", f"llama-server-stored-{sized}", "llama-server-ngram-cache", "llama-server-stored"]
    ) == {
        "llama-server": External("llama_server"),
        f"llama-server-stored-{sized}": External("llama_server", stored=True, ngram=sized),
        "llama-server-ngram-cache": External("llama_server", ngram="ngram-cache"),
        "llama-server-stored": External("llama_server", stored=True),
    }
    assert arm.lookups(names) == {"generate": 0, "lookup-5": 5}
    wrong = ["llamacpp-ngram-3", "llamacpp-lookup-0", "vllm-lookup-3", "vllm-stored", "vllm-", "sglang"]
    wrong += ["llama-server-lookup-3", "llama-server-ngram", "llama-server-ngram-mod:n-max"]
    for name in wrong:
        with pytest.raises(InvalidOption, match=rf"no baseline '{name}'.*llamacpp-lookup-10.*vllm-ngram-10"):
            arm.lookups([name])
    with pytest.raises(InvalidOption, match="given twice"):
        arm.lookups(["vllm", "vllm"])
    assert set(arm.ENGINES) == set(peer.SPECS)
    assert all((peer.HERE / f"{name}.py").exists() for name in peer.SPECS)


def test_what_peers_cannot_do(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InvalidOption,
        match=r"vllm: these engines are compared at temperature 0 only, and the temperature is 0.7",
    ):
        Job(baselines=["vllm"], temperature=0.7)
    with pytest.raises(InvalidOption, match=r"names 'sglang'; there are llamacpp, llama_server, vllm"):
        Job(baselines=["vllm"], peer_python={"sglang": "python"})
    with pytest.raises(InvalidOption, match=r"names vllm, and no --baseline of it"):
        Job(baselines=["llamacpp"], peer_python={"vllm": "python"})
    wanted = arm.externals(["llamacpp"])
    peer.check_model(wanted, str(folder), llm)
    with pytest.raises(InvalidOption, match=r"is not read from one; give llamacpp-lookup-4"):
        peer.check_model(arm.externals(["llamacpp-stored-lookup-4"]), str(folder), llm)
    with pytest.raises(InvalidOption, match=r"and the bench in float64; give --dtype float32"):
        peer.check_model(wanted, str(folder), selfdraft.LLM(str(folder), "plain", dtype="float64"))
    monkeypatch.setattr(llm.model.model.config, "attention_bias", True)
    with pytest.raises(PeerUnavailable, match=r"it is a llama model with attention_bias, .*; leave it out"):
        peer.check_model(wanted, str(folder), llm)


def test_a_peer_on_another_device(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.model, "device", torch.device("meta"))
    with pytest.raises(InvalidOption, match=r"and the bench on meta; give --device cpu"):
        peer.check_model(arm.externals(["vllm"]), "looped-tiny", llm)


def test_what_a_process_is_told(
    llm: LLM, folder: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many threads and the same dtype as here, and room for the longest answer and a draft behind it."""
    work = plan(source.from_files(suite.own(mine), [mine]), llm, 1, 6)
    assert work.context == len(llm.encode(work.items[0].turns[0])) + 6 + 4

    def told(context: int) -> Peer:
        (one,) = peer.arms(arm.externals(["vllm-ngram-7"]), {}, str(folder), llm, context, tmp_path)
        return one

    one = told(100)
    rest = {"dtype": "float32", "threads": torch.get_num_threads(), "lookup": 7, "ngram": ""}
    assert one.settings == {"model": str(folder), "context": 107, **rest}
    assert told(255).settings["context"] == 256
    assert (one.name, one.engine, one.python, one.grade) == ("vllm-ngram-7", "vllm", sys.executable, "base")
    assert (one.eos, one.plain, one.drafts) == (llm.eos_ids, "plain", False)
    python = tmp_path / "bin" / "python"
    vllm = peer.SPECS["vllm"]
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "LD_PRELOAD" not in peer._environment(vllm, str(python), one.settings)
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    set_for = peer._environment(vllm, str(python), {"threads": 3})
    assert (set_for["LD_PRELOAD"], set_for["OMP_NUM_THREADS"]) == (str(library), "3")
    monkeypatch.setenv("LD_PRELOAD", "mine.so")
    assert peer._environment(vllm, str(python), {})["LD_PRELOAD"] == f"{library}:mine.so"


def test_where_a_model_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "cached_file", lambda name, file: f"/hub/{name}/snapshot/{file}")
    assert peer.folder("looped-tiny") == EMBEDDED["looped-tiny"]
    assert peer.folder(str(folder)) == folder
    assert peer.folder("some/model") == Path("/hub/some/model/snapshot")


def test_command(workers: Path, command: Run, folder: Path, mine: Path, tmp_path: Path) -> None:
    words = (
        *("bench", "--file", str(mine), "--model", str(folder), "-n", "6", "--repeats", "1", "--json"),
        *("--baseline", "llamacpp-lookup-4", "--peer-python", f"llamacpp={sys.executable}"),
        *("--out", str(tmp_path / "out")),
    )
    code, out, err = command(*words)
    assert code == 0, err
    arms = json.loads(out.splitlines()[-1])["suites"]["mine"]["arms"]
    assert list(arms) == ["plain", "auto", "llamacpp-lookup-4"]
    assert arms["llamacpp-lookup-4"]["rows_per_forward"] == pytest.approx((1 + 5) / 2)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["peers"] == {"llamacpp": {"fake": "1"}}
    assert run["baselines"] == ["llamacpp-lookup-4"]
    assert (tmp_path / "out" / "bfloat16.gguf").exists()
    code, _, err = command(*words)
    assert code == 0
    assert "which has 6 answers" in " ".join(err.split())
    change(workers / "llamacpp.py", '"fake": "1"', '"fake": "2"')
    code, _, err = command(*words)
    assert code == 2
    assert "peers.llamacpp.fake" in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--baseline", "vllm", "--temperature", "0.5"], "temperature 0 only"),
        (["--baseline", "llamacpp", "--peer-python", "python"], "takes NAME=PATH"),
        (["--baseline", "llamacpp", "--peer-python", "llamacpp=no-such-python"], "cannot be run"),
        (["--baseline", "llamacpp", "--dtype", "float64"], "--dtype float32"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
    words: list[str], says: str, workers: Path, command: Run, folder: Path, mine: Path, tmp_path: Path
) -> None:
    model = ("--model", str(folder), "--out", str(tmp_path / "out"))
    code, out, err = command("bench", "--file", str(mine), *model, *words)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


# A model as one file


def tiny_qwen(dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A random Qwen2 with q, k and v biases, and one table for embedding and head."""
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=0,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model.to(dtype).eval()


def saved(
    path: Path, folder: Path, dtype: torch.dtype, made: Callable[..., Any] = tiny_llama, **config: Any
) -> Path:
    """A tiny random model with 2 key and value heads, and its tokenizer."""
    model = made(dtype)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, path)
    return path


def fits(file: Path, source: Path, dtype: str) -> bool:
    """Has the file every weight of the folder, to the bit, in that dtype? By their definitions."""
    config = json.loads((source / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = load_file(source / "model.safetensors")
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    found = {one.name: one for one in gguf.GGUFReader(file).tensors}
    kind = gguf.MODEL_ARCH[config["model_type"].upper()]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    same = len(found) == len(weights)
    for name, weight in weights.items():
        whole, _, what = name.rpartition(".")
        tensor = found[f"{names.get_name(whole)}.{what}"]
        data = np.array(tensor.data)
        right = weight.to(getattr(torch, dtype))
        if weight.dim() == 1:
            same &= torch.equal(torch.from_numpy(data), right.float())
            continue
        bits = torch.from_numpy(data.view(np.int32 if dtype == "float32" else np.int16))
        for part, count in heads.items():
            if part in name and kind is gguf.MODEL_ARCH.LLAMA:  # neighbours become two halves again
                bits = bits.reshape(count, -1, 2, bits.shape[-1]).transpose(1, 2)
        same &= torch.equal(bits.reshape(right.shape), right.view(bits.dtype))
        same &= tensor.tensor_type.name == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    return bool(same)


@pytest.mark.parametrize("made", [tiny_llama, tiny_qwen])
@pytest.mark.parametrize("kept", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_file_has_every_weight(
    kept: str, dtype: str, made: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path / "tiny", folder, getattr(torch, kept), made)
    gguf_folder.convert(source, tmp_path / "made.gguf", dtype)
    assert fits(tmp_path / "made.gguf", source, dtype)


def test_a_file_has_the_loaded_weights(llm: LLM, folder: Path, tmp_path: Path) -> None:
    """Also those that came from no folder, or were loaded in another dtype than they are stored in."""
    file = peer.gguf(sys.executable, llm, tmp_path)
    assert file == tmp_path / "float32.gguf"
    assert list(tmp_path.iterdir()) == [file]
    assert fits(file, folder, "float32")


def test_the_file_that_a_model_was_read_from(llm: LLM, folder: Path, tmp_path: Path) -> None:
    assert stored.gguf_source(str(folder)) is None
    assert stored.gguf_source(str(tmp_path)) is None
    file = peer.gguf(sys.executable, llm, tmp_path)
    assert stored.gguf_source(str(file)) == stored.gguf_source(str(tmp_path)) == file
    assert stored.stored_format(file) == "F32"
    assert peer.folder(str(file)) is None
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    read = sum(4 * weight.numel() for weight in weights.values()) - 4 * table.numel()
    assert stored.stored_bytes(file) == read
    wanted = arm.externals(["llamacpp-stored", "vllm"])
    peer.check_model(wanted, str(file), llm)
    one, other = peer.arms(wanted, {}, str(file), llm, 20, tmp_path)
    assert (one.settings["model"], one.weight_bytes) == (str(file), read)
    assert (Path(other.settings["model"]) / "tokenizer.json").exists()
    assert other.weight_bytes is None


FAULTS: dict[str, Callable[..., Any]] = {
    "turned_together": lambda rows, heads: np.arange(rows),
    "narrowed": lambda weight, dtype: (weight.view(np.uint32) >> 16).astype(np.uint16),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_file_is_seen(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "tiny", folder, torch.float32)
    gguf_folder.convert(source, tmp_path / "right.gguf", "bfloat16")
    monkeypatch.setattr(gguf_folder, fault, FAULTS[fault])
    gguf_folder.convert(source, tmp_path / "wrong.gguf", "bfloat16")
    assert fits(tmp_path / "right.gguf", source, "bfloat16")
    assert not fits(tmp_path / "wrong.gguf", source, "bfloat16")


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("made", [tiny_llama, tiny_qwen])
def test_a_file_says_what_the_folder_says(made: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "tiny", folder, torch.bfloat16, made)
    gguf_folder.convert(source, tmp_path / "made.gguf", "bfloat16")
    said, config = fields(tmp_path / "made.gguf"), json.loads((source / "config.json").read_text())
    spoken = json.loads((source / "tokenizer.json").read_text())
    ids = {token: id for id, token in enumerate(said["tokenizer.ggml.tokens"])}
    assert ids.items() >= spoken["model"]["vocab"].items()
    kind = said["general.architecture"]
    assert kind == config["model_type"]
    assert len(ids) == VOCABULARY == said[f"{kind}.vocab_size"]
    assert [one.split(" ") for one in said["tokenizer.ggml.merges"]] == spoken["model"]["merges"]
    assert said["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert said[f"{kind}.rope.freq_base"] == 10000
    assert said[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (said[f"{kind}.attention.head_count"], said[f"{kind}.attention.head_count_kv"]) == (4, 2)
    size = config.get("head_dim") or 16
    assert said[f"{kind}.attention.key_length"] == said[f"{kind}.rope.dimension_count"] == size
    assert (said[f"{kind}.block_count"], said[f"{kind}.context_length"]) == (2, 256)


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_scaled_positions_are_transformers(folder: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "tiny", folder, torch.float32, rope_parameters=SCALED)
    gguf_folder.convert(source, tmp_path / "scaled.gguf", "float32")
    (factors,) = (
        t for t in gguf.GGUFReader(tmp_path / "scaled.gguf").tensors if t.name == "rope_freqs.weight"
    )
    config = transformers.AutoConfig.from_pretrained(source)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500.0 ** (-torch.arange(0, 32, 2) / 32)
    assert torch.allclose(torch.from_numpy(np.array(factors.data)), plain / scaled, rtol=1e-5)
    assert (
        len({round(float(one), 3) for one in factors.data}) > 3
    )  # some stay, some are divided, some between


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gemma3_text"}, "it is a gemma3_text model, and only llama, qwen2"),
        ({"attention_bias": True}, "a llama model with attention_bias"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scaled by 'yarn'"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "scaled by 'dynamic'"),
    ],
)
def test_what_is_not_converted(config: dict[str, Any], says: str, folder: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "tiny", folder, torch.float32)
    given = json.loads((source / "config.json").read_text())
    assert gguf_folder.unfit(given) is None
    assert re.search(says, gguf_folder.unfit({**given, **config}) or "")
    (source / "config.json").write_text(json.dumps({**given, **config}))
    with pytest.raises(gguf_folder.Unfit, match=says):
        gguf_folder.convert(source, tmp_path / "made.gguf", "float32")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_conversion_that_fails(
    llm: LLM, workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "gguf_folder.py").write_text("import sys; sys.exit('it is too wide')")
    with pytest.raises(PeerUnavailable, match=r"cannot be converted; .*it is too wide"):
        peer.gguf(sys.executable, llm, tmp_path)


def test_what_is_missing_or_strange(folder: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "tiny", folder, torch.float64)
    with pytest.raises(gguf_folder.Unfit, match="is stored as F64"):
        gguf_folder.convert(source, tmp_path / "a.gguf", "float32")
    (source / "model.safetensors").unlink()
    with pytest.raises(gguf_folder.Unfit, match="no weights as safetensors"):
        gguf_folder.convert(source, tmp_path / "a.gguf", "float32")
    (source / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(gguf_folder.Unfit, match="byte-level BPE"):
        gguf_folder.convert(source, tmp_path / "a.gguf", "float32")
    with pytest.raises(gguf_folder.Unfit, match=r"model.layers.0.mlp.gate.weight is not a weight"):
        gguf_folder._named("model.layers.0.mlp.gate.weight")


def test_workers_import_nothing_of_the_package(tmp_path: Path) -> None:
    """They run under interpreters that do not have it."""
    code = (
        "import sys, runpy; [runpy.run_path(p) for p in sys.argv[1:]]; sys.exit('selfdraft' in sys.modules)"
    )
    files = [str(file) for file in peer.HERE.glob("*.py")]
    assert len(files) == 6
    assert subprocess.run([sys.executable, "-c", code, *files], cwd=tmp_path, check=False).returncode == 0


# The engines themselves, where they are installed. SELFDRAFT_LLAMACPP and SELFDRAFT_VLLM may name
# interpreters that have them.


def installed(engine: str) -> str:
    python = os.environ.get(f"SELFDRAFT_{engine.upper()}", sys.executable)
    try:
        peer.versions({engine: External(engine)}, {engine: python})
    except PeerUnavailable as error:
        pytest.skip(str(error))
    return python


@pytest.mark.parametrize("kind", ["llama", "scaled", "qwen2"])
@pytest.mark.parametrize("name", ["llamacpp", "llamacpp-lookup-5", "llamacpp-stored", "vllm", "vllm-ngram-5"])
def test_engines_say_what_transformers_says(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """In float32, where rounding hardly ever changes a pick: the same text."""
    wanted = arm.externals([name])
    (one,) = wanted.values()
    pythons = {one.engine: installed(one.engine)}
    scaled = {"rope_parameters": SCALED} if kind == "scaled" else {}
    made = tiny_qwen if kind == "qwen2" else tiny_llama
    source = saved(tmp_path / "tiny", folder, torch.float32, made, **scaled)
    llm = selfdraft.LLM(str(source), "plain", dtype="float32")
    prompt = llm.encode("def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return")
    plain = arm.drafted([], llm, selfdraft.SamplingParams())[0].answer(prompt, [], 40)
    if one.stored:
        source = peer.gguf(pythons["llamacpp"], llm, tmp_path)
    (engine,) = peer.arms(wanted, pythons, str(source), llm, len(prompt) + 40, tmp_path)
    try:
        answers = [engine.answer(prompt, [], 40) for _ in range(2)]
    finally:
        engine.close()
    for answer in answers:
        assert list(answer.ids) == list(plain.ids)
        assert answer.rows[0] == 1  # the prompt was read anew
        assert all(run <= rows for run, rows in zip(answer.runs, answer.rows, strict=True))
        assert one.lookup or set(answer.runs) == {1}
