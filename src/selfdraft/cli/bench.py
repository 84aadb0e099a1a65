"""`selfdraft bench`: methods and baselines side by side, on suites of prompts or one's own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidOption, InvalidSuite
from . import flags

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.journal import Key
    from ..bench.measure import Bench
    from ..bench.source import Source

DEFAULT_MODEL = "smollm2"  # models.loading.DEFAULT_MODEL, which would import torch for --help
NONE = "none"


def bench(
    suite: Annotated[
        list[str] | None, typer.Option("--suite", "-s", help="A set of prompts, listed above; repeatable.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="JSON lines of your own, see above; repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the suites' files. Default: download them with `datasets`."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="smollm2, a model folder, a GGUF file, or a hub id.")
    ] = DEFAULT_MODEL,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="NAME or NAME:OPTION=VALUE,...; repeatable. Default: auto."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, lookup-10 (generate with prompt lookup), or none; other engines: llamacpp (the "
            "loaded weights), llamacpp-stored (the GGUF file itself), each also with -lookup-10; "
            "llama-server, llama-server-stored, each also with -ngram-simple (-map-k, -map-k4v, -mod, "
            "-cache); vllm, vllm-ngram-10; repeatable. Default: generate."
        ),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="The Python interpreter that has llamacpp or vllm; repeatable. Default: this one.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as raw text, without the model's chat template.")
    ] = False,
    prompts: Annotated[int, typer.Option(help="Prompts per suite, spread evenly over it.")] = 100,
    repeats: Annotated[int, typer.Option(help="How often each prompt is answered.")] = 3,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", help="Longest answer, in tokens. Default: the suite's."),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Leave out longer prompts. Default: what fits the model's context.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed for a temperature above 0.")] = 0,
    weights: flags.Weights = None,
    activations: flags.Activations = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64; default: as stored.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if present.")] = None,
    numerics: Annotated[
        str | None, typer.Option(help="exact or fast, see `selfdraft generate`. Default: exact on the CPU.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for answers and report. Default: bench-HASH, by the settings."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Measure nothing: compare two reports, B over A."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the last line, which is JSON.")] = False,
) -> None:
    """Compare methods on the same prompts and machine.

    Plain decoding always runs; the others are compared with it, in text and in speed. All arms answer each
    prompt in turn, warm, --repeats times, from the same token ids. A model with a chat template is asked
    through it, unless --raw is given. Figures count each answer up to its first repetition, since every
    method drafts a loop easily. report.json has all figures, with every prompt's id, the machine and its
    background work; report.html shows them as one page with a sample answer.

    Answers are kept as they come. Stop at any time: the same command continues.

    Suites: py_edits, py_functions, py_code, humaneval, humaneval_x, mbpp, gsm8k, mt_bench, spec_bench,
    spider, llma_rag (retrieval), llma_cnndm (summaries). None is shipped: give --data, or let `datasets`
    download it.

    A file of your own has one JSON object per line: {"prompt": "..."} or {"turns": ["...", "..."]}; with
    "reference" or "references" for texts that answers may quote, and an "id" if you like.

    Examples:

      selfdraft bench --file my.jsonl --method auto --method llma:block=10

      selfdraft bench --suite py_edits --suite gsm8k --data DIR --method auto --method llma

      selfdraft bench -s humaneval -m llma --baseline generate --baseline lookup-10 --prompts 164

      selfdraft bench --compare before/report.json after/report.json
    """
    from rich.console import Console

    from ..bench import charts, report
    from ..bench.job import Job, circumstances
    from ..bench.page import page as made_page

    if compare is not None:
        _compare(*compare, given=bool(suite or file), as_json=as_json)
        return
    sources = _sources(suite or (), file or (), data)
    job = Job(
        model=model,
        methods=method or ["auto"],
        baselines=[] if baseline == [NONE] else baseline or ["generate"],
        peer_python=_interpreters(peer_python or ()),
        raw=raw,
        prompts=prompts,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        temperature=temperature,
        seed=seed,
        weights=weights,
        activations=activations,
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    running = job.prepare(sources, out)
    console = Console(stderr=True)
    with console.status("measuring the machine"):
        provenance, bound = circumstances(running)
    _warn(provenance["idle_cores_busy"], console)
    _measure(running, console)
    record = report.report(running, provenance, bound)
    path = running.journal.save("report.json", record)
    page = running.journal.write("report.html", made_page(record))
    if not charts.available():
        console.print(
            "selfdraft: report.html has no pictures, since matplotlib is not installed; "
            "pip install 'selfdraft[bench]', then run the same command again",
            style="yellow",
            markup=False,
        )
    if not as_json:
        report.show(record, _out())
    print(json.dumps({**report.summary(record), "report": str(path), "page": str(page)}))


def _out() -> Console:
    """The console for tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def _compare(a: Path, b: Path, given: bool, as_json: bool) -> None:
    """Compare two reports. Raises BenchError, and InvalidOption together with --suite or --file."""
    from ..bench import compare

    if given:
        raise InvalidOption("--compare measures nothing: give it without --suite and --file")
    record = compare.compare(compare.read(a), compare.read(b))
    if not as_json:
        compare.show(record, _out())
    print(json.dumps(record))


def _interpreters(given: Sequence[str]) -> dict[str, str]:
    """The interpreters of other engines. Raises InvalidOption."""
    found = {}
    for one in given:
        name, _, path = one.partition("=")
        if not path or name in found:
            raise InvalidOption(f"--peer-python takes NAME=PATH, once a name; got {one!r}")
        found[name] = os.path.expanduser(path)
    return found


def _sources(names: Sequence[str], files: Sequence[Path], data: Path | None) -> list[Source]:
    """Read the suites. Raises InvalidSuite."""
    from ..bench import source, suite

    if not names and not files:
        raise InvalidSuite(f"give --suite ({', '.join(suite.available())}) or --file, JSON lines of your own")
    known = [suite.named(name) for name in names]
    read = [source.from_folder(one, data) if data else source.from_home(one) for one in known]
    read += [source.from_files(suite.own(path), [path]) for path in files]
    called = [one.suite.name for one in read]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise InvalidSuite(f"two suites are called {twice[0]!r}; a file is called by its name, so rename it")
    return read


def _warn(busy: float | None, console: Console) -> None:
    from .._common.machine import QUIET

    if busy is not None and busy > QUIET:
        console.print(
            f"selfdraft: {busy:.1f} cores are busy with other work; figures will suffer", style="yellow"
        )


def _measure(running: Bench, console: Console) -> None:
    """Run, with a progress bar that is drawn between answers only."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if running.journal.found:
        console.print(
            f"selfdraft: continuing in {running.journal.folder}, which has {running.journal.found} answers"
        )
    try:
        with Progress(*columns, console=console, auto_refresh=False) as bar:
            task = bar.add_task("", total=running.answers(), completed=running.journal.found)

            def tell(key: Key) -> None:
                bar.update(task, advance=1, description=f"{key.suite} {key.arm}", refresh=True)

            running.run(tell)
    except KeyboardInterrupt:
        kept = len(running.journal.records)
        console.print(
            f"selfdraft: {kept} answers are kept in {running.journal.folder}; the same command continues"
        )
        raise
