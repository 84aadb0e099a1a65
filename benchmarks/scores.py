"""Right answers to HumanEval and GSM8K, of a model and of the weights that adapters make of it.

    python benchmarks/scores.py --data DIR [--model smollm2] [--adapter smollm2-cllm ...] [--prompts 164]

Greedy answers, the model's chat template. HumanEval: the code of the answer, run with the tests of the set
in a process of its own, for a few seconds at most; it is code that a model wrote, so do this where that may
be. GSM8K: the last number of the answer is the solution's. Beside each score: how many items only the base,
and only the tuned weights, got right, which says whether a difference is more than chance.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdraft import LLM
from selfdraft.bench import source, suite

SECONDS = 5
TOGETHER = 16
CODE = re.compile(r"```\w*\n(.*?)(?:```|\Z)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Row = Mapping[str, Any]


def solves(row: Row, answer: str) -> bool:
    """HumanEval: does the code of the answer pass the item's tests?"""
    found = CODE.search(answer)
    code = found[1] if found else answer
    head = f"def {row['entry_point']}("
    if head not in code:
        code = row["prompt"] + code
    before = row["prompt"][: row["prompt"].rindex(head)]  # imports, and functions that the asked one uses
    program = f"{before}\n{code}\n{row['test']}\ncheck({row['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program], cwd=folder, timeout=SECONDS, capture_output=True
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def counts(row: Row, answer: str) -> bool:
    """GSM8K: is the last number of the answer that of the solution?"""
    said = NUMBER.findall(answer)
    wanted = row["answer"].rsplit("####", 1)[-1].strip()
    return bool(said) and number(said[-1]) == number(wanted)


def number(text: str) -> float:
    return float(text.replace(",", ""))


SETS: Mapping[str, Callable[[Row, str], bool]] = {"humaneval": solves, "gsm8k": counts}


def rows_of(path: Path) -> list[Row]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def right(llm: LLM, name: str, data: Path, count: int, tokens: int) -> list[bool]:
    """For each item of a set: is the answer right?"""
    given = suite.named(name)
    rows = rows_of(data / given.files[0])[:count]
    prompts = [item.chat[0] for item in source.from_folder(given, data).items[:count]]
    judged: list[bool] = []
    for at in range(0, len(rows), TOGETHER):
        answers = llm.generate(prompts[at : at + TOGETHER], max_new_tokens=tokens)
        judged += [
            SETS[name](row, one.text) for row, one in zip(rows[at : at + TOGETHER], answers, strict=True)
        ]
        print(f"{name}: {sum(judged)} of {len(judged)} right", file=sys.stderr)
    return judged


def compared(base: Sequence[bool], tuned: Sequence[bool]) -> dict[str, int]:
    pairs = list(zip(base, tuned, strict=True))
    return {
        "items": len(pairs),
        "right": sum(tuned),
        "only base": sum(a and not b for a, b in pairs),
        "only tuned": sum(b and not a for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds gsm8k and humaneval")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", action="append", default=[], help="repeatable")
    parser.add_argument("--set", action="append", choices=[*SETS], help="default: both")
    parser.add_argument("--prompts", type=int, default=164)
    parser.add_argument("--tokens", type=int, default=256)
    asked = parser.parse_args()
    record: dict[str, dict[str, dict[str, int]]] = {}
    for name in asked.set or SETS:
        base: list[bool] | None = None
        for adapter in (None, *asked.adapter):
            llm = LLM(asked.model, adapter=adapter)
            judged = right(llm, name, asked.data, asked.prompts, asked.tokens)
            base = judged if base is None else base
            found = compared(base, judged)
            record.setdefault(name, {})[adapter or "base"] = found
            print(f"{name:10} {adapter or 'base':20} {found}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
