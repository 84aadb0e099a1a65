"""Pass rates: what passes, what must not, and that each limit is what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import judge
from passing import EXAMS, STOP, humaneval, mbpp, rates
from sets import EvaluationError

ADD = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
DOUBLE = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "import math\r\ndef half(x): \r\n  return x/2\r\ndef double (x) : \r\n  return 2*x",
    "test_setup_code": "two = double(1)",
    "test_list": ["assert double(4) == 8", "assert two == 2"],
}
WRONG = {
    "another sum": "    return a * b\n",
    "nothing": "",
    "no Python": "    return (\n",
    "leaves early": "    import sys\n    sys.exit(0)\n",
    "leaves at once": "    import os\n    os._exit(0)\n",
    "leaves before the tests": "    return a + b\nimport sys\nsys.exit(0)\n",
    "leaves behind the back": "    return a + b\nimport atexit, os\natexit.register(os._exit, 1)\n",
}
HOG = "kept = bytearray(1 << 30)\n"
LONG = "with open('long', 'wb') as file:\n    file.write(bytes(2 << 20))\n"


def test_a_right_answer_passes() -> None:
    assert judge.passes(humaneval(ADD).program("    return a + b\n"))
    assert judge.passes(mbpp(DOUBLE).program("    print('x' * 10**6)\n    return 2 * x\n"))


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_fails(answer: str) -> None:
    assert not judge.passes(humaneval(ADD).program(answer))


def test_an_endless_loop_fails() -> None:
    assert not judge.passes("while True:\n    pass\n", seconds=0.5)
    assert not judge.passes("import time\ntime.sleep(60)\n", seconds=0.5)


@pytest.mark.parametrize(
    ("program", "limit"), [(HOG, "RLIMIT_AS"), (LONG, "RLIMIT_FSIZE")], ids=["memory", "file"]
)
def test_what_takes_too_much_fails_by_that_limit(
    program: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not judge.passes(program)
    monkeypatch.setitem(judge.LIMITS, limit, 4 << 30)
    assert judge.passes(program)


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "here")
    assert judge.passes("import os\nassert 'PLANTED' not in os.environ\n")
    assert judge.passes("import os\nassert os.listdir() == ['program.py']\n")


def test_a_word_written_too_soon_is_a_fault_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = judge.RUNNER.splitlines(keepends=True)
    run = next(i for i, line in enumerate(lines) if line.startswith("runpy"))
    monkeypatch.setattr(judge, "RUNNER", "".join([*lines[:run], *lines[run + 1 :], lines[run]]))
    early = {name for name, answer in WRONG.items() if judge.passes(humaneval(ADD).program(answer))}
    assert early == {"leaves early", "leaves at once", "leaves before the tests"}


def test_prompt_of_mbpp_is_the_signature_under_test_with_the_text() -> None:
    assert mbpp(DOUBLE).prompt == (
        'def double(x):\n    """Write a function to double a number."""\n'
    )
    with pytest.raises(EvaluationError, match="task 11: its tests call no function"):
        mbpp(DOUBLE | {"code": "def other(x):\n  return x"})


class Answering:
    """A generator that knows some answers by heart."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def generate(self, prompts: list[str], **options: Any) -> list[SimpleNamespace]:
        assert options == {"max_new_tokens": 9, "stop": STOP}
        return [SimpleNamespace(text=self.answers.get(prompt, "")) for prompt in prompts]


def test_rates_count_what_passes_of_the_test_split(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]]
    rows = {"humaneval": [ADD] * 18, "mbpp": [DOUBLE | {"task_id": n} for n in (10, 11, 510, 511)]}
    for name, found in rows.items():
        path = tmp_path / f"{EXAMS[name].file}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    right = Answering({mbpp(DOUBLE).prompt: "    return x + x\n"})
    found = rates(right, tmp_path, 17, 9)  # type: ignore[arg-type]
    assert found == {
        "humaneval_passed": 0,
        "humaneval_tasks": 17,
        "mbpp_passed": 2,
        "mbpp_tasks": 2,
    }
    with pytest.raises(
        EvaluationError, match=r"no humaneval/HumanEval.jsonl.gz in .*; give --data"
    ):
        rates(right, tmp_path / "mbpp", 1, 9)  # type: ignore[arg-type]
