"""Compares token ids of GGUF files with llama.cpp's, on fixed and generated strings.

    python scripts/token_ids.py --llama-python PYTHON FILE.gguf ...
    python scripts/token_ids.py --llama-python PYTHON --expected tests/token_ids.json FILE.gguf

PYTHON is an interpreter that has llama-cpp-python. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from selfdraft.models.gguf.reader import GgufFile
from selfdraft.models.gguf.tokenizer import GgufTokenizer

FIXED = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three    four ",
    "1234567890 3.14159 0x1F 1,000,000 ½ Ⅷ ²",
    "\ttab\t\ttabs \t mixed",
    "one\ntwo\r\nthree\n\n\nfour \n five\r",
    "日本語のテキスト、中文字符。한국어 문장",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 é naïve",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "it's IT'S we've WE'VE I'm they'll o'clock",
    "def f(x):\n    return x**2  # comment\n\n\n",
    "العربية עברית ไทย हिन्दी",
    "a\u00a0b\u2003c\u200bd\ufeffe\u0000f",
    "(((a[b]{c})))!?...;:'\"\\`~@#$%^&*_+-=|<>/",
    "camelCaseWord snake_case SCREAMING_CASE kebab-case",
    "https://example.org/a?b=c&d=%20#e",
]
PIECES = [
    *"aZ é日한🙂0179",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    "'s",
    "'LL",
    "the",
    " and",
    "123",
    "<|im_end|>",
]
PIECES += [*".,!?()[]{}<>|$+=~^-_/\\\"'", "½", "\u0301", "\u00a0", "ß", "Ж", " Москва", "def ", "return"]
ASK = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(open(sys.argv[2], encoding="utf-8"))
json.dump([llama.tokenize(t.encode(), add_bos=True, special=True) for t in texts], open(sys.argv[3], "w"))
"""


def generated(count: int) -> list[str]:
    pick = random.Random(18)
    words = ["".join(pick.choices(PIECES, k=pick.randint(1, 40))) for _ in range(count)]
    ranges = (range(32, 0xD800), range(0xE000, 0x1FFFF))
    anything = [chr(pick.choice(pick.choice(ranges))) for _ in range(4000)]
    return words + ["".join(pick.choices(anything, k=pick.randint(1, 30))) for _ in range(count)]


def by_llama_cpp(python: str, file: Path, texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "texts.json", Path(folder) / "ids.json"
        given.write_text(json.dumps(texts), encoding="utf-8")
        subprocess.run([python, "-c", ASK, str(file), str(given), str(made)], check=True)
        ids: list[list[int]] = json.loads(made.read_text())
        return ids


def ours(file: Path, texts: list[str]) -> list[list[int]]:
    raw = Tokenizer.from_str(json.dumps(GgufTokenizer(GgufFile(file)).tokenizer_json()))
    return [raw.encode(text).ids for text in texts]


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--count", type=int, default=500, help="generated strings of each of two kinds")
    parser.add_argument("--expected", type=Path, help="write llama.cpp's ids of the fixed strings")
    args = parser.parse_args()
    texts = FIXED + generated(args.count)
    summary = {}
    for file in args.files:
        theirs = by_llama_cpp(args.llama_python, file, texts)
        different = [
            (text, a, b) for text, a, b in zip(texts, ours(file, texts), theirs, strict=True) if a != b
        ]
        for text, a, b in different[:10]:
            print(f"{text!r}\n  here      {a}\n  llama.cpp {b}")
        summary[file.name] = {"compared": len(texts), "equal": len(texts) - len(different)}
        if args.expected:
            pairs = dict(zip(FIXED, theirs, strict=False))
            args.expected.write_text(json.dumps(pairs, indent=0, ensure_ascii=True) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return int(any(one["equal"] < one["compared"] for one in summary.values()))


if __name__ == "__main__":
    sys.exit(main())
