"""Put a trained adapter into the package, with a card that says what it learned from.

    python scripts/ship_adapter.py RUN --name smollm2-space --data ANSWERS --prompts PROMPTS/train.jsonl \\
        --figures figures.md

RUN is what `selfdraft train` has written, ANSWERS its --data, PROMPTS what those answer (JSON lines with a
`kind`); of an adapter of the GPU job RUN says that itself, and the two are left out. `figures.md` holds what
was measured with the adapter; it becomes a part of the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfdraft import LLM
from selfdraft.models.adapters import folder as adapter_folder

MOST = 6_000_000  # bytes of an adapter in the package
KEPT = ("README.md", "acceptance.png", "convergence.png", adapter_folder.CONFIG, adapter_folder.WEIGHTS)
DATA = """
## Data

{answers:,} answers of {base} itself, {tokens:,} tokens, {greedy:.0%} of them greedy and the others sampled at
temperature {temperature:g}, up to {longest} tokens each. By kind of prompt:

| kind | answers | tokens | share of the tokens |
|---|---|---|---|
{kinds}
"""


def counted(data: Path, prompts: Path) -> dict[str, Any]:
    """What the answers of `selfdraft distill` are, as a GPU job notes it: see `data_section`."""
    kinds = [json.loads(line)["kind"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    shards = sorted(data.glob("shard-*.jsonl"))
    rows = [json.loads(line) for path in shards for line in path.read_text(encoding="utf-8").splitlines()]
    asked: dict[str, Any] = json.loads((data / "distill.json").read_text(encoding="utf-8"))["asked"]
    found: dict[str, list[int]] = {}
    for row in rows:
        pair = found.setdefault(kinds[row["index"]], [0, 0])
        pair[0] += 1
        pair[1] += len(row["answer"])
    greedy = sum(row["temperature"] == 0 for row in rows) / max(1, len(rows))
    return {**asked, "greedy_share": greedy, "kinds": found}


def data_section(base: str, about: Mapping[str, Any]) -> str:
    """Sizes and shares of the answers, in Markdown. about: `kinds` has answers and tokens of each kind of
    prompt; greedy_share, temperature and max_new_tokens are those of the answers."""
    kinds: Mapping[str, tuple[int, int]] = about["kinds"]
    answers, tokens = (sum(pair[i] for pair in kinds.values()) for i in (0, 1))
    lines = (
        f"| {kind} | {count:,} | {size:,} | {size / tokens:.1%} |"
        for kind, (count, size) in sorted(kinds.items(), key=lambda entry: -entry[1][0])
    )
    return DATA.format(
        answers=answers,
        base=base,
        tokens=tokens,
        greedy=about["greedy_share"],
        temperature=about["temperature"],
        longest=about["max_new_tokens"],
        kinds="\n".join(lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--figures", type=Path, required=True)
    args = parser.parse_args()
    size = (args.run / adapter_folder.WEIGHTS).stat().st_size
    if size > MOST:
        raise SystemExit(
            f"{args.run} takes {size:,} bytes, more than the {MOST:,} of an adapter in the package"
        )
    out = adapter_folder.SHIPPED / args.name
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (args.run / name).exists():
            shutil.copyfile(args.run / name, out / name)
    record = json.loads((out / adapter_folder.CONFIG).read_text(encoding="utf-8"))
    base = record["selfdraft"]["base_name"]
    if "shape" not in record["selfdraft"]:  # an adapter of an earlier version
        record["selfdraft"]["shape"] = adapter_folder.shape(LLM(base, "plain").model)
    (out / adapter_folder.CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    card = (out / "README.md").read_text(encoding="utf-8")
    for mark in ("# {}:", 'adapter="{}"'):  # the name of a run may be a word of the card
        card = card.replace(mark.format(args.run.name), mark.format(args.name))
    card = card.replace(", commit None", "")  # it was trained from a copy of the sources
    given = record["selfdraft"]["run"]["data"]
    about = counted(args.data, args.prompts) if args.data else given
    parts = (card, data_section(base, about), args.figures.read_text(encoding="utf-8"))
    (out / "README.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
