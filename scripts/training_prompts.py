"""Prompts to train draft adapters on, as conversations: the mix that the adapters of `smollm2` learn from.

    python scripts/training_prompts.py --data DATA --out PROMPTS
    selfdraft distill --prompts PROMPTS/openings.jsonl --raw --greedy-share 0 -t 1 -n 96 --out written
    python scripts/training_prompts.py --data DATA --out PROMPTS --written written
    selfdraft distill --prompts PROMPTS/train.jsonl --out answers --max-new-tokens 192

`openings.jsonl` is the chat template up to a user's words: what the model goes on with is a prompt like those
that it was tuned on, which the second call of the script adds to the mix (the second and third line can be
left out).
DATA holds gzipped JSON lines: sets of questions (`prompt`), dialogues (`turns`), code and texts (`text`).
Rows are in random order, so any first part of them is the same mix. `held_out.jsonl` has the kinds whose
names begin with "held-out": whole domains, to measure on, that `train.jsonl` has nothing of.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from selfdraft import LLM

Messages = list[dict[str, str]]
HELD_OUT = "held-out"
HELD_OUT_TEXTS = ("openstax_psychology", "docs_rust_book", "docs_pytest")
TASKS = {
    "function": (
        "Complete the following Python function.\n\n```python\n{}\n```",
        "Write the body of this function:\n\n```python\n{}\n```",
        "{}",
    ),
    "code": (
        "Explain what this code does.\n\n```python\n{}\n```",
        "Write a docstring for this code:\n\n```python\n{}\n```",
        "Write unit tests for the following code.\n\n```python\n{}\n```",
        "Find possible problems in this code and suggest improvements.\n\n```python\n{}\n```",
    ),
    "passage": (
        "Summarize the following text in a few sentences.\n\n{}",
        "Summarize this passage in one sentence:\n\n{}",
        "{}\n\nWhat are the key points of this text? Answer as a list.",
        "Read the passage and answer the question.\n\n{}\n\nQuestion: What is the main idea?",
        "Write three questions about this text, each with its answer.\n\n{}",
        "Explain this to a ten-year-old:\n\n{}",
    ),
    "rewrite": (
        "Rewrite the following text to make it more concise.\n\n{}",
        "Rewrite this in a friendly, informal tone:\n\n{}",
        "Rewrite the text in the past tense, changing nothing else.\n\n{}",
        "Turn the following text into a numbered list of facts.\n\n{}",
    ),
    "correct": (
        "Correct the spelling and grammar of this text. Give the corrected text alone.\n\n{}",
        "Fix the mistakes in the following text:\n\n{}",
    ),
    "topic": (
        "What is {}?",
        "Explain {} with an example.",
        "Write a short essay about {}.",
        "Give me five facts about {}.",
        "What are the advantages and disadvantages of {}?",
        "Write an email to a colleague about {}.",
        "Write a short story in which {} plays a role.",
    ),
}


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def questions(path: Path) -> Iterator[Messages]:
    return (user(row["prompt"]) for row in rows(path) if len(row["prompt"]) > 10)


def tasks(kind: str, texts: Iterator[str], rng: random.Random) -> Iterator[Messages]:
    return (user(rng.choice(TASKS[kind]).format(text)) for text in texts)


def dialogues(path: Path, rng: random.Random) -> Iterator[Messages]:
    """Each dialogue up to one of the user's turns."""
    roles = {"User": "user", "Assistant": "assistant"}
    for row in rows(path):
        turns = [turn.partition(": ") for turn in row["turns"]]
        ends = [i for i, (speaker, _, _) in enumerate(turns) if speaker == "User"]
        if ends:
            until = rng.choice(ends) + 1
            yield [{"role": roles[who], "content": said} for who, _, said in turns[:until]]


def passages(paths: list[Path], rng: random.Random) -> Iterator[str]:
    """Without end: runs of whole paragraphs of prose, of 40 to 220 words, from all files alike."""
    texts = [[row["text"] for row in rows(path)] for path in paths]
    while True:
        paragraphs = re.split(r"\n\s*\n", rng.choice(rng.choice(texts)))
        start, wanted, taken = rng.randrange(len(paragraphs)), rng.randint(60, 200), 0
        part = []
        for paragraph in paragraphs[start:]:
            part.append(paragraph.strip())
            taken += len(paragraph.split())
            if taken >= wanted:
                break
        text = "\n\n".join(part)
        prose = sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)
        if 40 <= taken <= 220 and prose:
            yield text


def snippets(path: Path, rng: random.Random) -> Iterator[str]:
    """Functions and classes out of files, at most two of each file."""
    for row in rows(path):
        parts = [part for part in re.split(r"\n(?=def |class |@)", row["text"]) if 200 < len(part) < 1600]
        yield from (part.strip("\n") for part in rng.sample(parts, min(2, len(parts))))


def topics(paths: list[Path], rng: random.Random) -> Iterator[str]:
    """Titles of sections."""
    titles = {row["text"].partition("\n")[0].strip("# =") for path in paths for row in rows(path)}
    plain = sorted(title for title in titles if re.fullmatch(r"[A-Za-z][A-Za-z0-9 ,'\-]{3,60}", title))
    for title in rng.sample(plain, len(plain)):
        yield title if rng.random() < 0.5 else title.lower()


def with_mistakes(text: str, rng: random.Random) -> str:
    """A text in which letters are swapped or lost, words doubled, left out or without their capital."""
    words = []
    for word in text.split(" "):
        chance, at = rng.random(), rng.randrange(max(1, len(word) - 1))
        if chance < 0.06 and len(word) > 3:
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif chance < 0.1 and len(word) > 3:
            word = word[:at] + word[at + 1 :]
        elif chance < 0.12:
            word = f"{word} {word}"
        elif chance < 0.14:
            continue
        words.append(word.lower() if rng.random() < 0.05 else word)
    return " ".join(words)


def written(folder: Path, llm: LLM) -> Iterator[Messages]:
    """The user's words as the model wrote them, where it came to their end."""
    for path in sorted(folder.glob("shard-*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row["finish_reason"] == "eos":
                yield user(str(llm.tokenizer.decode(row["answer"], skip_special_tokens=True)).strip())


def opening(llm: LLM) -> str:
    """The chat template up to the words of a user."""
    mark = "\x00"
    turns: Any = user(mark)
    text = llm.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return str(text).partition(mark)[0]


def sources(data: Path, rng: random.Random) -> dict[str, tuple[float, Iterator[Messages]]]:
    """By kind its share of the prompts and where they come from."""
    texts = sorted((data / "text").glob("*.jsonl.gz"))
    held_out = [path for path in texts if path.name.startswith(HELD_OUT_TEXTS)]
    near = [path for path in texts if path not in held_out]
    books = [path for path in near if path.name.startswith("openstax_")]
    signatures = (row["prompt"] for row in rows(data / "py_functions.jsonl.gz"))
    spoilt = (with_mistakes(text, rng) for text in passages(books, rng))
    return {
        "function": (0.12, tasks("function", signatures, rng)),
        "code": (0.07, tasks("code", snippets(data / "py_code_educational.jsonl.gz", rng), rng)),
        "edit": (0.08, questions(data / "py_edits.jsonl.gz")),
        "worked problem": (0.16, questions(data / "gsm8k_train.jsonl.gz")),
        "question": (0.08, questions(data / "openstax_qa.jsonl.gz")),
        "explanation": (0.05, questions(data / "neetcode_explain.jsonl.gz")),
        "dialogue": (0.07, dialogues(data / "sgd_train.jsonl.gz", rng)),
        "command": (0.04, questions(data / "tldr_commands.jsonl.gz")),
        "sql": (0.02, questions(data / "wikisql_train.jsonl.gz")),
        "passage": (0.15, tasks("passage", passages(near, rng), rng)),
        "rewrite": (0.04, tasks("rewrite", passages(books, rng), rng)),
        "correct": (0.04, tasks("correct", spoilt, rng)),
        "topic": (0.08, tasks("topic", topics(books, rng), rng)),
        f"{HELD_OUT} sql": (0.01, questions(data / "spider_train.jsonl.gz")),
        f"{HELD_OUT} dialogue": (0.01, dialogues(data / "taskmaster4.jsonl.gz", rng)),
        f"{HELD_OUT} passage": (0.01, tasks("passage", passages(held_out, rng), rng)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="whose tokens and chat template count")
    parser.add_argument("--count", type=int, default=12_000, help="prompts in all")
    parser.add_argument("--longest", type=int, default=500, help="tokens of a prompt")
    parser.add_argument("--written", type=Path, help="answers of the model to openings.jsonl")
    args = parser.parse_args()
    rng, llm = random.Random(0), LLM(args.model, "plain", numerics="fast")
    made: dict[str, dict[str, Any]] = {}
    found_in = sources(args.data, rng)
    if args.written is not None:
        found_in["the model's own"] = (0.1, written(args.written, llm))
    for kind, (share, found) in found_in.items():
        wanted = round(share * args.count)
        pool = list(islice(found, 12 * wanted))  # in random order, which does not follow the files
        short = (m for m in rng.sample(pool, len(pool)) if len(llm.prompt_ids(None, m)) <= args.longest)
        for messages in islice(short, wanted):
            made.setdefault(json.dumps(messages), {"kind": kind, "messages": messages})
    mixed = rng.sample(list(made.values()), len(made))
    args.out.mkdir(parents=True, exist_ok=True)
    begin = json.dumps({"prompt": opening(llm)}) + "\n"
    (args.out / "openings.jsonl").write_text(begin * (args.count // 5), encoding="utf-8")
    for name, held_out in (("train", False), ("held_out", True)):
        kept = [row for row in mixed if row["kind"].startswith(HELD_OUT) == held_out]
        lines = (json.dumps(row) + "\n" for row in kept)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(kept)} prompts, {dict(Counter(row['kind'] for row in kept))}")


if __name__ == "__main__":
    main()
