"""The process of another inference engine, asked in JSON lines.

    python worker.py ENGINE.py [SETTINGS]

The first line out is {"ready": versions}, once the engine is imported and, with SETTINGS, has loaded the
model; or {"missing": what} where it is not installed. Then each line in, {"prompt": ids, "length": n,
"eos": ids}, is answered by one line out:

    ids    the answer's tokens, up to and including one that ends the text
    runs   tokens of each step that emitted any
    rows   rows that were run for each of these steps, without those of the prompt
    times  seconds from the request to the end of each step
    peak   peak memory in bytes, null where the system does not report it
    spent  processor seconds

ENGINE.py has `versions()`, which raises ImportError or FileNotFoundError where something is missing, and
`Engine(settings)`. It may have `prepare()`, which is called before each answer, outside of its time, and says
which process will make it: time and memory are that one's. Its `steps(prompt, length, eos)` yields pairs: new
tokens, and the rows that were run since the previous pair. 0 rows mean that the tokens belong to the same
step. It may yield more than was asked for; the rest is not requested.

Engines print, so what they write to standard output goes to standard error. The process ends when its input
ends, also in the middle of an answer, so that it does not outlive the bench; where it leads a group of
processes, those that it has started end with it.
"""

from __future__ import annotations

import json
import os
import queue
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO


def main() -> None:
    with suppress(ValueError):
        sys.path.remove(os.path.dirname(os.path.realpath(__file__)))  # its vllm.py is not vLLM
    out = own_output()
    asked = contexts()
    given = runpy.run_path(sys.argv[1])
    try:
        versions = given["versions"]()
    except (ImportError, FileNotFoundError) as error:
        say(out, {"missing": str(error)})
        return
    engine = given["Engine"](json.loads(sys.argv[2])) if len(sys.argv) > 2 else None
    say(out, {"ready": versions})
    while True:
        say(out, answer(engine, **json.loads(asked.get())))


def own_output() -> TextIO:
    """Standard output, reserved for the protocol."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def contexts() -> queue.SimpleQueue[str]:
    """Lines of standard input as they arrive. The process ends when they end."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def say(out: TextIO, value: object) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


def answer(engine: Any, prompt: list[int], length: int, eos: list[int]) -> dict[str, Any]:
    """One answer, step by step, with its time and memory."""
    pid = engine.prepare() if hasattr(engine, "prepare") else os.getpid()
    reset_peak(pid)
    spent, started = seconds(pid), time.perf_counter()
    ids: list[int] = []
    runs: list[int] = []
    rows: list[int] = []
    times: list[float] = []
    ran = 1 - len(prompt)  # the prompt's rows do not count, except the last one, which picks the first token
    for tokens, more in kept(engine.steps(prompt, length, eos), length, frozenset(eos)):
        ran += more
        if not tokens:
            continue
        if more or not runs:
            runs.append(0)
            rows.append(ran)
            times.append(0.0)
            ran = 0
        ids += tokens
        runs[-1] += len(tokens)
        times[-1] = time.perf_counter() - started
    took = {"peak": peak(pid), "spent": seconds(pid) - spent}
    return {"ids": ids, "runs": runs, "rows": rows, "times": times, **took}


def kept(
    steps: Iterator[tuple[list[int], int]], length: int, eos: frozenset[int]
) -> Iterator[tuple[list[int], int]]:
    """The steps up to `length` tokens, or up to a token that ends the text."""
    left = length
    for tokens, rows in steps:
        end = next((at + 1 for at, token in enumerate(tokens) if token in eos), left + 1)
        own = tokens[: min(left, end)]
        left -= len(own)
        yield own, rows
        if left == 0 or len(own) == end:
            return


def seconds(pid: int) -> float:
    """Processor seconds of this process, and of another one that works for it (where /proc is)."""
    own = time.process_time()
    if pid != os.getpid():
        with suppress(OSError), open(f"/proc/{pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
            own += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return own


def reset_peak(pid: int) -> None:
    """Start a new measurement of peak memory."""
    with suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def peak(pid: int) -> int | None:
    """Peak memory since then in bytes, since the start where it cannot be reset; None where it is unknown."""
    with suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32" or pid != os.getpid():
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
