"""Prompts that give a drafter nothing to gain, so that its losses show.

    python benchmarks/hostile.py hostile.jsonl
    selfdraft bench --file hostile.jsonl -m auto -m llma -m jacobi --baseline lookup-10 --temperature 1.2

Random words and digits, poems, answers in other languages, lists without repetition: 40 prompts, always the
same. The column `p10` is the 10th percentile over plain decoding; `report.json` has the ratio of each prompt
(`prompts`, `against_plain`). Random words continue best with --raw; measure greedy decoding too.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

TOPICS = (
    "rain",
    "a lighthouse",
    "iron",
    "the number seven",
    "an empty train",
    "moss",
    "a broken clock",
    "salt",
)
ASKED = (
    "Schreibe einen kurzen Text über {}.",
    "Écris un court texte sur ce sujet : {}.",
    "Escribe un texto corto sobre {}.",
    "Scrivi un breve testo su {}.",
    "Napisz krótki tekst na temat: {}.",
    "Kirjoita lyhyt teksti aiheesta {}.",
    "{}について短い文章を書いてください。",
    "请写一篇关于{}的短文。",
)
SYLLABLES = ("ba", "ke", "li", "mo", "ru", "ta", "shi", "vo", "zen", "qua", "pir", "du")


def prompts(dice: random.Random) -> Iterator[tuple[str, str]]:
    """Name and text of each prompt."""
    for i in range(8):
        words = ["".join(dice.choices(SYLLABLES, k=dice.randint(1, 4))) for _ in range(60)]
        yield f"words-{i}", f"Go on with random words, none of them twice: {' '.join(words)}"
    for i in range(8):
        yield f"digits-{i}", f"Go on: {' '.join(str(dice.randint(0, 99999)) for _ in range(40))}"
    for i, topic in enumerate(TOPICS):
        yield f"poem-{i}", f"Write a poem without rhymes or repetition about {topic}."
    for i, (asked, topic) in enumerate(zip(ASKED, TOPICS, strict=True)):
        yield f"language-{i}", asked.format(topic)
    for i, topic in enumerate(TOPICS):
        yield (
            f"list-{i}",
            f"Name thirty words that come to mind at the thought of {topic}, without a comment.",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="JSON lines to write")
    out: Path = parser.parse_args().out
    lines = [json.dumps({"id": name, "prompt": text}) for name, text in prompts(random.Random(0))]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({"prompts": len(lines), "file": str(out)}))


if __name__ == "__main__":
    main()
