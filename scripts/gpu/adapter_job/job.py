"""There: stages one after the other, each with its share of the time; what failed is reported, and the next
one runs."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import time
import traceback
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.loading import drive, end_ids, load_pretrained
from selfdraft.train.filler import choose_filler

from . import measuring, texts
from .llama import Llama
from .sampling import distil
from .texts import Row
from .training import RECIPES, Recipe, train

LEAST = 1.0  # seconds that a stage needs
CLOSE = 5e-2  # relative difference of the compiled forward that is taken for rounding


class Job:
    """What all stages share. work: what they keep, to go on from. out: what is taken away."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.perf_counter()
        self.work, self.out = args.work, args.out
        for folder in (self.work, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.about: dict[str, Any] = json.loads((args.packed / "about.json").read_text(encoding="utf-8"))
        self.kinds: list[str] = self.about["kinds"]
        self.base_name: str = self.about["model"]
        path = self.work / "report.json"
        self.report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        plain = "bfloat16" if torch.cuda.is_available() else "float32"
        pretrained, self.tokenizer = load_pretrained(str(self._weights()), args.dtype or plain, args.device)
        self.model = drive(pretrained.requires_grad_(False), "fast")
        self.device = self.model.device
        self.eos = sorted(end_ids(pretrained.config, pretrained.generation_config, self.tokenizer))
        self.fast = Llama.of(pretrained)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        base = self.model.fingerprint() == self.about["fingerprint"]
        self.note("machine", torch=torch.__version__, device=device, same_base=base)
        self._read: tuple[list[Path], list[Row]] = [], []  # files of answers, and what they hold
        self.tell(f"{self.base_name} on {device}")

    @cached_property
    def compiled(self) -> Llama:
        """The forward with compiled row functions, if that works here and gives the same."""
        if self.device.type != "cuda":
            return self.fast
        try:
            quick, ids = self.fast.with_compiled(), torch.randint(1000, (64, 512), device=self.device)
            with torch.no_grad():
                mine, own = quick.read(ids).hidden.float(), self.fast.read(ids).hidden.float()
            apart = float((mine - own).norm() / own.norm())
            if not apart < CLOSE:
                raise ValueError(f"compiled rows differ by {apart:.3g}")
        except Exception as error:  # whatever a compiler can raise; the eager forward does the same
            self.tell(f"not compiled: {error!s:.300}")
            return self.fast
        self.tell(f"compiled; differs by {apart:.2g}")
        return quick

    @cached_property
    def prompts(self) -> list[Row]:
        return texts.load([self.args.packed / "prompts.npz"])

    def rows(self) -> list[Row]:
        """Prompts with their answers."""
        own = sorted((self.work / "answers").glob("part-*.npz"))
        paths = [self.args.answers] if self.args.answers else own
        if self._read[0] != paths:
            self._read = paths, texts.load(paths)
        return self._read[1]

    def recipe(self, stage: str) -> Recipe:
        """The stage's own, with what the command line says otherwise."""
        names = ("anchors", "rate", "lora_rate", "tokens", "length", "keep", "seed")
        given = {name: getattr(self.args, name) for name in names if getattr(self.args, name) is not None}
        recipe = replace(RECIPES[stage], **given)
        if not recipe.block:
            return recipe
        filler = choose_filler(self.tokenizer, self.model.vocab_size, self.eos, [])
        return replace(recipe, config=replace(recipe.config, filler=filler))

    def take(self, stage: str) -> None:
        """Put an adapter into one file to take away. It names its base as where it was packed, since the
        weights are the same file's, whatever this version of transformers says of its config."""
        folder = self.work / stage
        path = folder / adapter_folder.CONFIG
        record = json.loads(path.read_text(encoding="utf-8"))
        record["selfdraft"]["base"] = self.about["fingerprint"]
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        with tarfile.open(self.out / f"{stage}.tar", "w") as file:
            for one in sorted(folder.iterdir()):
                if one.name != "state.pt":
                    file.add(one, f"{stage}/{one.name}")

    def tell(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f}] {text}", flush=True)

    def note(self, stage: str, **found: Any) -> None:
        """Into the report, which is written at once."""
        self.report.setdefault(stage, {}).update(found)
        for folder in (self.work, self.out):
            part = folder / "report.part"
            part.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            part.replace(folder / "report.json")

    def left(self) -> float:
        """Seconds up to the limit of the call."""
        return float(self.args.limit - (time.perf_counter() - self.began))

    def _weights(self) -> Path:
        """The model, joined from its pieces. Raises SystemExit where one is missing or damaged."""
        folder = self.work / "model"
        if not folder.exists():
            try:
                raw = b"".join((self.args.packed / name).read_bytes() for name in self.about["pieces"])
            except FileNotFoundError as error:
                raise SystemExit(f"a piece of the model is missing: {error.filename}") from error
            if hashlib.sha256(raw).hexdigest() != self.about["sha256"]:
                raise SystemExit("the pieces of the model are not those that were packed: bring all again")
            with tarfile.open(fileobj=io.BytesIO(raw)) as file:
                file.extractall(folder, filter="data")
        return folder


def run(args: argparse.Namespace) -> None:
    plan = [
        (stage, float(seconds or 60)) for stage, _, seconds in (one.partition("=") for one in args.stages)
    ]
    unknown = [stage for stage, _ in plan if stage not in (*RECIPES, "distil", "measure")]
    if unknown:
        raise SystemExit(f"no stage {unknown[0]}; there are distil, {', '.join(RECIPES)}, measure")
    job = Job(args)
    torch.manual_seed(args.seed or 0)
    for number, (stage, seconds) in enumerate(plan):
        wanted = sum(later for _, later in plan[number:])
        share = seconds * min(1.0, job.left() / wanted)  # those to come are shortened alike
        if share < min(LEAST, seconds):
            job.tell(f"no time is left for {stage}")
            continue
        began = time.perf_counter()
        job.report.get(stage, {}).pop("error", None)
        try:
            if stage in RECIPES:
                train(job, stage, share)
            else:
                {"distil": distil, "measure": measuring.measure}[stage](job, share)
        except Exception as error:  # the next stage may still work, and the call is dear
            traceback.print_exc(file=sys.stdout)
            job.note(stage, error=repr(error)[:500])
        job.tell(f"{stage} took {time.perf_counter() - began:.0f} s")
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    print(measuring.figures(job.report))
