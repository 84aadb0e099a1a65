"""scripts/gpu/train_adapters.py: its forward is the package's, and a whole job ends in adapters that load."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from selfdraft import LLM
from selfdraft._common.repetition import fresh as before_loop
from selfdraft.drafting.plain import Plain
from selfdraft.models.adapters.adapter import AdapterConfig
from selfdraft.models.transformers import TransformersModel
from selfdraft.train.packed import Packing
from selfdraft.train.packed import batch as packed
from selfdraft.train.sequences import Batches
from selfdraft.train.student import IGNORED, Loss, Student, fresh
from selfdraft.train.tuned import NO_ROW, TunedLoss, TunedStudent

import runs
from conftest import tiny_llama

SCRIPTS = Path(__file__).parents[1] / "scripts" / "gpu"
CONFIGS = [
    AdapterConfig(3),
    AdapterConfig(3, prefix=4, sampler=16),
    AdapterConfig(2, distinct=False, rank=4, targets=("q_proj", "o_proj", "up_proj"), sampler=16),
    AdapterConfig(3, rank=4, alpha=8.0, targets=("v_proj", "gate_proj", "down_proj")),
]
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def job_modules() -> dict[str, ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        from adapter_job import job, measuring, prepare, sampling, students, texts
        from adapter_job.llama import Llama
    finally:
        sys.path.remove(str(SCRIPTS))
    assert Llama
    return {
        part.__name__.rpartition(".")[2]: part
        for part in (job, measuring, prepare, sampling, students, texts)
    }


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return TransformersModel(tiny_llama(torch.float64).requires_grad_(False), "fast")


def batch(masks: int, stride: int = 32) -> dict[str, torch.Tensor]:
    rows = [{"prompt": runs.random_prompt(9, 1), "answer": runs.random_prompt(n, n)} for n in (20, 31, 6)]
    return Batches(64, 5, masks, stride)([{**row, "draw": i} for i, row in enumerate(rows)])


def students(
    modules: dict[str, ModuleType], model: TransformersModel, config: AdapterConfig
) -> tuple[Student, Student]:
    """The package's and the fast one around the same random adapter."""
    adapter = fresh(model, config, seed=1).double()
    with torch.no_grad():
        for part in adapter.parameters():
            part.add_(torch.randn_like(part) * 0.1)
    fast = modules["students"].Llama.of(model.model)
    loss = Loss(decay=0.7)
    return Student(model, adapter, loss), modules["students"].FastStudent(model, adapter, loss, fast)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_fast_student_is_the_packages(
    job_modules: dict[str, ModuleType], model: TransformersModel, config: AdapterConfig
) -> None:
    """Losses, hits, gradients, and what calibration sees."""
    slow, quick = students(job_modules, model, config)
    given = batch(config.masks)
    found = []
    for student in (slow, quick):
        student.zero_grad()
        out = student(**given)
        out["loss"].backward()
        found.append((out, [part.grad.clone() for part in student.adapter.parameters() if part.numel()]))
    (a, own), (b, other) = found
    near = {"rtol": 1e-3, "atol": 1e-5}  # transformers takes norms in float32
    torch.testing.assert_close(a["loss"], b["loss"], **near)
    assert torch.equal(a["hits"], b["hits"])
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, **near)
    mine, theirs = (student.as_decoded(given["ids"], given["anchors"]) for student in (slow, quick))
    torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize("fault", ["own", "above", "positions"])
def test_what_rows_see_is_compared(
    job_modules: dict[str, ModuleType],
    model: TransformersModel,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = job_modules["students"]
    sight, run = module.sight, module.Llama.run
    if fault == "own":  # groups see one another
        monkeypatch.setattr(module, "sight", lambda anchors, *rest: sight(anchors, *rest).clamp(min=-1.0))
    elif fault == "above":  # one token more of the text
        monkeypatch.setattr(module, "sight", lambda anchors, *rest: sight(anchors + 1, *rest))
    else:

        def shifted(self: object, x: torch.Tensor, at: torch.Tensor, *rest: object) -> torch.Tensor:
            return run(self, x, at + (x.shape[1] != 64), *rest)  # of branches alone

        monkeypatch.setattr(module.Llama, "run", shifted)
    with pytest.raises(AssertionError):
        test_the_fast_student_is_the_packages(job_modules, model, CONFIGS[0])


def states(right: torch.Tensor) -> torch.Tensor:
    """Noisy blocks: the first token is right, and every third one is not."""
    return torch.where(torch.arange(right.shape[-1]) % 3 == 2, (right + 5) % 300, right)


@pytest.mark.parametrize("block", [0, 6])
def test_tuned_students_are_the_packages(
    job_modules: dict[str, ModuleType],
    model: TransformersModel,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses and gradients of LoRA on all rows, with masks and with noisy blocks."""
    module = job_modules["students"]
    config = AdapterConfig(0 if block else 3, rank=4, targets=("q_proj", "down_proj"), gated=False)
    adapter = fresh(model, config, seed=1).double()
    with torch.no_grad():
        for part in adapter.parameters():
            part.add_(torch.randn_like(part) * 0.1)
    loss, size = Loss(decay=1.0 if block else 0.7), block or config.masks
    given = batch(size)
    ids, anchors, labels = (given[name] for name in ("ids", "anchors", "labels"))
    ends = torch.tensor([29, 40, 15])
    fast = module.Llama.of(model.model)
    if block:
        quick = module.BlockStudent(model, adapter, loss, fast, 3.0, block)
        monkeypatch.setattr(quick, "noisy", lambda text, right, anchors: states(right))
    else:
        quick = module.TunedFastStudent(model, adapter, loss, fast, 3.0)
    packings = []
    for text, end, own, known in zip(ids, ends.tolist(), anchors.tolist(), labels.tolist(), strict=True):
        packing = Packing(text[:end].tolist())
        for anchor, targets in zip(own, known, strict=True):
            if targets[0] == IGNORED:
                continue
            right = text[(anchor + 1 + torch.arange(size)).clamp(max=len(text) - 1)]
            hung = packing.hang(anchor, states(right).tolist() if block else range(320, 320 + size))
            aims = [NO_ROW if token == IGNORED else anchor + 1 + i for i, token in enumerate(targets)]
            packing.groups.append(list(zip(hung, aims, strict=True)))
        packings.append(packing)
    slow = TunedStudent(model, adapter, TunedLoss(weight=3.0, decay=loss.decay))
    runs_of = (lambda: quick(ids, anchors, labels, ends), lambda: slow(**packed(packings, [0, 0, 0], size)))
    found = []
    for forward in runs_of:
        adapter.zero_grad()
        total = forward()["loss"]
        total.backward()
        found.append([total.detach(), *(part.grad.clone() for part in adapter.parameters() if part.numel())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5, check_dtype=False)


def test_answers_are_the_models_own(job_modules: dict[str, ModuleType], model: TransformersModel) -> None:
    """Greedy ones are those of the package, in whatever batch; they end where that text would loop."""
    texts, sampling = job_modules["texts"], job_modules["sampling"]
    eos = (1, 7)
    answers = sampling.Answers(job_modules["students"].Llama.of(model.model), eos, 40, 4096)
    rows = [texts.Row(runs.random_prompt(n, n), [], 0, n == 5, 0.0) for n in (5, 9, 14)]
    sampled = replace(rows[0], temperature=0.9)
    made = answers([*rows, sampled])
    for row in made[:3]:
        plain = list(runs.run(model, Plain(), row.prompt, runs.greedy(40), eos_ids=eos).emitted)
        assert row.answer == plain[: before_loop(plain)]
    assert [row.held_out for batch in answers.batches(rows) for row in batch] == [True, False, False]
    table = torch.randint(3, (50, 60), generator=torch.Generator().manual_seed(0)).numpy()
    assert sampling.before_loops(table).tolist() == [before_loop(line) for line in table.tolist()]


def test_batches_go_on_where_they_were(job_modules: dict[str, ModuleType]) -> None:
    texts = job_modules["texts"]
    pairs = [(runs.random_prompt(9, n), runs.random_prompt(n, n)) for n in range(6, 300, 9)]
    rows = [texts.Row(*pair, 0, False, 0.0) for pair in pairs]
    given = rows, Batches(512, 4, 3, texts.STRIDE), 1024, torch.device("cpu"), 5
    whole = [made for made, _ in zip(texts.batches(*given), range(30), strict=False)]
    later = [made for made, _ in zip(texts.batches(*given, skip=12), range(18), strict=False)]
    for one, two in zip(whole[12:], later, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert {made["ids"].numel() for made in whole} == {1024}
    assert {made["ids"].shape[1] for made in whole} == {256, 512}


@pytest.fixture(scope="module")
def chatting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template and a token for the filler."""
    path = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(folder, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.mark.usefixtures("short_answers")
def test_a_whole_job_ends_in_adapters_that_load(
    job_modules: dict[str, ModuleType],
    chatting: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    kinds = {"train": ("function", "question"), "held_out": ("held-out sql",)}
    for name, own in kinds.items():
        rows = [
            {"kind": kind, "messages": [{"role": "user", "content": f"{kind} {i} of a list"}]}
            for kind in own
            for i in range(30)
        ]
        (prompts / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*words: str) -> str:
        script = runs.script("scripts/gpu/train_adapters.py")
        monkeypatch.setattr(sys, "argv", ["train_adapters.py", *map(str, words)])
        script.main()
        return capsys.readouterr().out

    monkeypatch.syspath_prepend(str(SCRIPTS))
    packed, there = tmp_path / "packed", tmp_path / "there"
    out = run("prepare", "--prompts", prompts, "--packed", packed, "--model", chatting, "--there", there)
    assert "1. bring" in out
    assert "2. bring" in out
    there.mkdir()
    for path in packed.glob("*/*"):
        shutil.copy(path, there)
    job = (
        "job",
        "--packed",
        there,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    small = ("--answer", "24", "--slots", "4096", "--tokens", "512", "--length", "256", "--anchors", "4")
    monkeypatch.setattr(job_modules["measuring"], "COSTED", 2)
    stages = ("distil=5", "bita=2", "bita-published=2", "space=2", "space-tuned=2", "cllm=2", "measure=9")
    out = run(*job, *small, "--hold", "0.5", "--tell", "0.3", *stages)
    print(out)
    report = json.loads((tmp_path / "work" / "report.json").read_text())
    assert {name: about["error"] for name, about in report.items() if "error" in about} == {}
    assert report["machine"]["same_base"]
    assert json.loads(out.splitlines()[-1])["space"]["held-out sql"]["chain"] >= 1
    for name in ("bita", "bita-published", "space", "space-tuned", "cllm"):
        with tarfile.open(tmp_path / "out" / f"{name}.tar") as file:
            file.extractall(tmp_path, filter="data")
        card, published = (tmp_path / name / "README.md").read_text(), name == "bita-published"
        assert ("The settings of the training are the published ones." in card) == published
        method = {"cllm": "jacobi", "bita-published": "bita"}.get(name, name)
        llm = LLM(str(chatting), method, adapter=str(tmp_path / name))
        drafted = llm.generate("def add(", max_new_tokens=8)
        assert drafted.grade == ("tuned" if name in ("space-tuned", "cllm") else "base")
        assert drafted.ids == llm.using("plain").generate("def add(", max_new_tokens=8).ids

    ship = runs.script("scripts/ship_adapter.py")
    monkeypatch.setattr(ship.adapter_folder, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "figures.md").write_text("## Measured\n\nNothing.\n")
    words = (tmp_path / "space", "--name", "tiny-space", "--figures", tmp_path / "figures.md")
    monkeypatch.setattr(sys, "argv", ["ship_adapter.py", *map(str, words)])
    ship.main()
    card = (tmp_path / "shipped" / "tiny-space" / "README.md").read_text()
    assert "# tiny-space: a space adapter" in card
    assert 'LLM("chat", "space", adapter="tiny-space")' in card
    assert "| question | " in card
    assert card.rstrip().endswith("Nothing.")

    steps = report["space"]["step"]
    run(*job, *small, "--answers", tmp_path / "out" / "answers.npz", "space=1", "measure=9")
    later = json.loads((tmp_path / "work" / "report.json").read_text())
    assert later["space"]["step"] > steps
    (there / "model.0").write_bytes(b"other")
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(SystemExit, match="not those that were packed"):
        run(*job, "measure")
