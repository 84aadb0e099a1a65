"""Here: prompts as token ids, and the model in pieces, each small enough to travel."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from selfdraft import LLM
from selfdraft.models import smollm2

from . import texts
from .texts import Row

TEMPERATURE = 0.8  # of every second answer; the others, and held-out ones, are greedy
BRING = "bring {packed}/{name}; run: mkdir -p {there} && cp {packed}/{name}/* {there}/"
STAGES = "distil=100 space=110 bita=110 space-tuned=90 measure=60"
WHEELS = "python3 -m pip install -q --no-index --no-deps --target {there}/site {packed}/job/*.whl"
JOB = """bring {packed}/job, with the checkout; run (9 minutes; what lies in $OUT comes back):
   cp {packed}/job/* {there}/ && {wheels} && export PYTHONUNBUFFERED=1 PYTHONPATH=src:{there}/site && \\
   python3 scripts/gpu/train_adapters.py job --packed {there} --work {there}/work --out $OUT --limit 530 \\
   {stages} 2>&1 | tee $OUT/log.txt"""


def prompts(folder: Path, llm: LLM, most: int, measured: int) -> tuple[list[Row], list[str]]:
    """Those that `scripts/training_prompts.py` made; some of each kind, and whole kinds, are held
    out. most: tokens of one. measured: held-out prompts of each kind."""
    files = [folder / "train.jsonl", folder / "held_out.jsonl"]
    given = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = sorted({row["kind"] for row in given})
    held: Counter[str] = Counter()
    rows = []
    for row in given:
        ids = [*llm.prompt_ids(None, row["messages"])]
        if len(ids) > most:
            continue
        held_out = held[row["kind"]] < measured
        held[row["kind"]] += held_out
        if held_out or not row["kind"].startswith("held-out"):
            heat = 0.0 if held_out or len(rows) % 2 else TEMPERATURE
            rows.append(Row(ids, [], kinds.index(row["kind"]), held_out, heat))
    return rows, kinds


def packed_model(name: str) -> bytes:
    """The model's file or folder, as a tar file."""
    path = smollm2.gguf_file() if name == smollm2.NAME else Path(name)
    if not path.exists():
        raise SystemExit(f"{name}: give smollm2, a GGUF file or a folder")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        for one in sorted(path.iterdir()) if path.is_dir() else [path]:
            file.add(one, one.name)
    return made.getvalue()


def run(args: argparse.Namespace) -> None:
    shutil.rmtree(args.packed, ignore_errors=True)
    (args.packed / "job").mkdir(parents=True)
    llm = LLM(args.model, "plain", numerics="fast")
    rows, kinds = prompts(args.prompts, llm, args.longest, args.held_out)
    texts.save(args.packed / "job" / "prompts.npz", rows)
    for wheel in args.wheels.glob("*.whl") if args.wheels else ():
        shutil.copy(wheel, args.packed / "job")
    raw = packed_model(args.model)
    size, names = args.piece << 20, []
    for number, at in enumerate(range(0, len(raw), size)):
        folder = args.packed / f"piece{number}"
        folder.mkdir()
        names.append(f"model.{number}")
        (folder / names[-1]).write_bytes(raw[at : at + size])
    about: dict[str, Any] = {
        "model": args.model if args.model == smollm2.NAME else Path(args.model).name,
        "fingerprint": llm.model.fingerprint(),
        "kinds": kinds,
        "pieces": names,
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    (args.packed / "job" / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    tokens = sum(len(row.prompt) for row in rows)
    held = sum(row.held_out for row in rows)
    print(f"{len(rows):,} prompts of {tokens:,} tokens, {held:,} held out; {len(names)} pieces of the model")
    where = {"packed": args.packed, "there": args.there}
    for number in range(len(names)):
        print(f"{number + 1}. {BRING.format(name=f'piece{number}', **where)}")
    wheels = WHEELS.format(**where) if args.wheels else "true"
    print(f"{len(names) + 1}. {JOB.format(wheels=wheels, stages=STAGES, **where)}")
