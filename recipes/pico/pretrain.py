"""Pretrain pico: `pretrain.py --work DIR`, stopped and started again at will.

The stable run has no horizon: it goes on at a constant learning rate until it is stopped (Ctrl-C
or SIGTERM leave a checkpoint) and saves every ten minutes. `--decay STEPS` branches off the newest
checkpoint into a folder of its own and takes the rate to zero; the stable run can go on afterwards.
Where a run stands is in the checkpoint's `progress.json`, and the stream of tokens follows from it
alone. `--from-weights DIR` starts from exported weights with a fresh, warmed-up optimizer.
Weights stay float32, products run in bfloat16 (autocast), on CPU and GPU alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from selfdraft.train.memory import keep_memory

import tokenizer as tokens
from bits import bits_per_byte, spread
from optimizer import make, rate
from settings import HERE, WORK, RecipeError, Settings, Shape, load
from stream import Mixture, open_shards
from watch import Progress, Watch, newest, on_signals, progress_of, step_of


class CheckpointError(RecipeError):
    """There is no checkpoint to start from."""


@dataclass(frozen=True)
class Job:
    """One call of the command: where it works, what it starts from, when it ends."""

    work: Path
    shards: Path
    weights: Path | None = None
    decay_steps: int = 0
    steps: int = 0  # 0: no limit
    minutes: float = float("inf")


@dataclass(frozen=True)
class Branch:
    """The run that the job belongs to: the stable one, or a decay of it."""

    folder: Path
    checkpoint: Path | None
    decay: tuple[int, int] | None  # (first step, number of steps)


def configuration(shape: Shape, entries: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=entries,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def branch(job: Job) -> Branch:
    """Where to go on. A decay is named after the stable step that it leaves, and resumes too."""
    stable = job.work / "stable"
    trunk = newest(stable)
    if not job.decay_steps:
        return Branch(stable, trunk, None)
    if trunk is None:
        raise CheckpointError(f"no checkpoint in {stable} to branch off; pretrain first")
    first = step_of(trunk)
    folder = job.work / f"decay-{first}"
    note = folder / "decay.json"
    folder.mkdir(exist_ok=True)
    if not note.is_file():
        note.write_text(json.dumps(job.decay_steps))
    return Branch(folder, newest(folder) or trunk, (first, json.loads(note.read_text())))


class Pretraining(Trainer):
    """Trainer with the recipe's optimizer, schedule and loss."""

    def __init__(
        self,
        settings: Settings,
        decay: tuple[int, int] | None,
        model: PreTrainedModel,
        **options: Any,
    ) -> None:
        super().__init__(model=model, **options)
        self.settings, self.decay, self.network = settings, decay, model
        self.model_accepts_loss_kwargs = False  # micro-batches are equal: a plain mean is right
        self.loss = self.plain_loss
        if settings.run.compile:
            self.loss = torch.compile(self.plain_loss, dynamic=False)

    def plain_loss(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.network(input_ids=ids, labels=ids, use_cache=False).loss
        assert isinstance(loss, torch.Tensor)
        return loss

    def compute_loss(
        self, model: object, inputs: dict[str, torch.Tensor], *_: object, **__: object
    ) -> torch.Tensor:
        with torch.autocast(self.args.device.type, torch.bfloat16):
            return self.loss(inputs["input_ids"])

    def create_optimizer(self, model: object = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make(self.network, self.settings.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            target = optimizer or self.create_optimizer()
            factor = rate(self.settings.schedule.warmup_steps, self.decay)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, factor)
        return self.lr_scheduler


def arguments(settings: Settings, folder: Path, steps: int) -> TrainingArguments:
    """Logs and checkpoints come from `Watch`; an item of the stream is a whole micro-batch."""
    batch = settings.batch
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=batch.tokens_per_step // batch.micro_tokens,
        max_grad_norm=settings.optimizer.clip,
        logging_strategy="no",
        save_strategy="no",
        save_total_limit=settings.run.keep,
        ignore_data_skip=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=settings.seed,
    )


def train(settings: Settings, job: Job) -> Progress:
    here = branch(job)
    here.folder.mkdir(parents=True, exist_ok=True)
    set_seed(settings.seed)
    progress = progress_of(here.checkpoint or job.weights)
    if job.weights and not here.checkpoint:
        model = LlamaForCausalLM.from_pretrained(job.weights, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(configuration(settings.shape, settings.tokenizer.entries))
    encoder = tokens.read(job.shards / "tokenizer")
    lengths, held = tokens.byte_lengths(encoder), open_shards(job.shards, "held")
    how = settings.evaluation

    def measure() -> dict[str, float]:
        picked = {name: spread(held[name], how.context, how.windows) for name in how.sources}
        return {name: bits_per_byte(model, windows, lengths) for name, windows in picked.items()}

    watch = Watch(settings, progress, here.folder / "log.jsonl", measure, job.minutes)
    stages = settings.stages[-1:] if here.decay else settings.stages
    last = sum(here.decay) if here.decay else settings.schedule.max_steps
    trainer = Pretraining(
        settings,
        here.decay,
        model,
        args=arguments(settings, here.folder, min(last, job.steps or last)),
        train_dataset=Mixture(open_shards(job.shards), settings, stages, progress.tokens),
        data_collator=lambda items: items[0],
        processing_class=encoder,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    with on_signals(watch.stop):
        trainer.train(resume_from_checkpoint=str(here.checkpoint) if here.checkpoint else None)
    return progress


def main(
    work: Annotated[Path, typer.Option(help="Work folder of the recipe.")] = WORK,
    shards: Annotated[Path | None, typer.Option(help="Shards; default WORK/shards.")] = None,
    from_weights: Annotated[Path | None, typer.Option(help="Start from exported weights.")] = None,
    decay: Annotated[int, typer.Option(help="Branch off with this many decay steps.")] = 0,
    steps: Annotated[int, typer.Option(help="Stop at this step (0: no limit).")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after this much work.")] = float("inf"),
    settings: Annotated[Path, typer.Option(help="Another settings file.")] = HERE / "settings.toml",
) -> None:
    """Train until stopped, or branch off a decay."""
    chosen = load(settings)
    if chosen.run.threads:
        torch.set_num_threads(chosen.run.threads)
    keep_memory()
    done = train(chosen, Job(work, shards or work / "shards", from_weights, decay, steps, minutes))
    print(f"{done.tokens:,} tokens in {done.seconds / 3600:.2f} hours; see {work}")


if __name__ == "__main__":
    typer.run(main)
