"""docs/demo.svg, the README's picture: what `selfdraft demo` shows on a terminal, colours and all.

    python scripts/demo_picture.py [--lines 60] [--out docs/demo.svg]

It runs the demo behind a pseudo-terminal, keeps the first task, and draws it with rich. The figures in the
picture are those of the machine it ran on.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

HOME = Path(__file__).resolve().parents[1]
WIDTH = 100  # columns
SPINNER = re.compile(r"(?:\x1b\[[0-9;]*m)?[\u2800-\u28ff]")


def shown(words: list[str]) -> str:
    """What a command writes to a terminal."""
    screen, inside = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    told = bytearray()
    with subprocess.Popen(words, stdout=inside, stderr=inside, env=environment) as running:
        os.close(inside)
        with suppress(OSError):  # reading fails once the command has ended
            while data := os.read(screen, 65536):
                told.extend(data)
    os.close(screen)
    if running.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed")
    return told.decode().replace("\r\n", "\n")


def first_task(text: str, lines: int) -> str:
    """From the first rule to before the second, without what a spinner drew and wiped away."""
    kept = [line.rpartition("\x1b[2K")[2] for line in text.split("\n")]
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-HJKhl]|\r", "", line) for line in kept]
    plain = [line for line in plain if not SPINNER.match(line)]
    rules = [i for i, line in enumerate(plain) if "──" in line and re.search(r"[a-z]{3,} ", line)]
    return "\n".join(plain[rules[0] : rules[1]][:lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lines", type=int, default=60, help="lines of the picture, at most")
    parser.add_argument("--out", type=Path, default=HOME / "docs" / "demo.svg")
    given = parser.parse_args()
    text = first_task(shown([str(Path(sys.executable).with_name("selfdraft")), "demo"]), given.lines)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(text))
        svg = console.export_svg(title="selfdraft demo")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # nothing is fetched
    given.out.write_text(svg, encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
