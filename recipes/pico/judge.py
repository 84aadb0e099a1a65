"""Whether a program passes the tests at its end: each in a Python process of its own.

The process is `python -I` in a fresh temporary folder. It inherits no environment and no open file,
and has limits on time, processor time, memory, file size and processes. A program passes if the
process ends with exit code 0 after the last line has run: then, and only then, a word drawn for it
is written, so that a program which leaves early by `sys.exit(0)` or `os._exit(0)` is seen.

This keeps the mistakes of a model from harming the machine. It is no sandbox against malice: what
runs may read files and use the network with the rights of whoever started it, and limits on the
number of processes do not bind root.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

SECONDS = 5.0  # of a program, start included
AT_ONCE = 2
LIMITS = {  # names of `resource`; bytes where they are sizes
    "RLIMIT_AS": 512 << 20,
    "RLIMIT_CPU": 5,  # seconds
    "RLIMIT_FSIZE": 1 << 20,
    "RLIMIT_CORE": 0,
    "RLIMIT_NPROC": 0,  # none beside itself
}
RUNNER = """\
import os, resource, runpy, sys
word, place = sys.argv.pop(), os.path.abspath("word")
for name, most in {limits}.items():
    resource.setrlimit(getattr(resource, name), (most, most))
runpy.run_path("program.py", run_name="__main__")
with open(place, "w") as file:
    file.write(word)
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end, without an error and within the limits."""
    word = secrets.token_hex(16)
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "program.py").write_bytes(program.encode())
        code = exit_code([RUNNER.format(limits=LIMITS), word], folder, seconds)
        written = folder / "word"
        return code == 0 and written.is_file() and written.read_text() == word


def exit_code(arguments: Sequence[str], folder: Path, seconds: float) -> int | None:
    """How `python -c` ends, or None where time runs out. What it started ends with it."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", *arguments],
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def judge(programs: Sequence[str]) -> Iterator[bool]:
    """Whether each of them passes, in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(passes, programs)
