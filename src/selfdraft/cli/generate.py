"""`selfdraft generate`: one answer, streamed, with its figures."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidOption, InvalidPrompt
from . import flags, sampling_flags

if TYPE_CHECKING:
    from ..llm import LLM, Stream
    from ..outputs import Completion

WARM_UP = 8  # tokens generated before a comparison, since the first forwards of a shape are slower
Text = Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.", show_default=False)]


def generate(
    prompt: Text = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    model: flags.Model = flags.DEFAULT_MODEL,
    method: flags.Method = flags.DEFAULT_METHOD,
    option: flags.MethodOptions = None,
    adapter: flags.Adapter = None,
    reference: flags.References = None,
    raw: flags.Raw = False,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.")] = None,
    temperature: sampling_flags.Temperature = None,
    top_k: sampling_flags.TopK = None,
    top_p: sampling_flags.TopP = None,
    min_p: sampling_flags.MinP = None,
    repetition_penalty: sampling_flags.RepetitionPenalty = None,
    presence_penalty: sampling_flags.PresencePenalty = None,
    frequency_penalty: sampling_flags.FrequencyPenalty = None,
    logit_bias: sampling_flags.LogitBias = None,
    seed: sampling_flags.Seed = None,
    samples: sampling_flags.Samples = 1,
    max_new_tokens: sampling_flags.MaxNewTokens = None,
    min_new_tokens: sampling_flags.MinNewTokens = None,
    stop: sampling_flags.Stop = None,
    eos: sampling_flags.Eos = None,
    ignore_eos: sampling_flags.IgnoreEos = False,
    logprobs: sampling_flags.Logprobs = None,
    weights: flags.Weights = None,
    activations: flags.Activations = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: flags.Numerics = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run plain decoding too, and compare text and speed.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Ask a model, and watch the answer come.

    A prompt goes through the model's chat template if it has one; --raw continues the text as it is.
    Drafting changes the speed, never the words: --compare runs plain decoding too, and says how much faster
    the method was and whether the texts are identical.

    Examples:

      selfdraft generate "Why is the sky blue?" --compare

      selfdraft generate --file prompt.txt --reference notes.txt --json

      echo "Write a haiku about rain." | selfdraft generate - --temperature 0.8 --seed 7

      selfdraft generate --raw "def fibonacci(n):" --stop "def " --samples 3 --temperature 0.8
    """
    from ..llm import read_reference
    from .paint import console

    flags.check_text("the prompt", prompt)
    flags.check_text("--system", system)
    for text in stop or ():
        flags.check_text("--stop", text)
    question = _question(_prompt(prompt, file), raw, system)
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": sampling_flags.biases(logit_bias) or None,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "stop": tuple(stop or ()) or None,
        "eos": tuple(eos or ()) or None,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    _check(samples, settings, as_json, compare)
    references = [read_reference(path) for path in reference or ()]
    with console(stderr=True).status(f"loading {model}") as status:
        llm = flags.load(model, method, option, adapter, weights, activations, dtype, device, numerics)
        if method != "plain":
            status.update("measuring step times")
            llm.model.cost(1)
        if samples > 1:
            status.update(f"generating {samples} answers")
            with sampling_flags.naming_flags(settings):
                answers = llm.generate(n=samples, references=references, **question, **settings)
    if samples > 1:
        _show_samples(answers, as_json)
    else:
        _answer(Job(llm, question, references, settings), compare, as_json)


@dataclass(frozen=True)
class Job:
    """What one call of the command asks of its model."""

    llm: LLM
    question: Mapping[str, Any]
    """The prompt as arguments of `LLM.generate`."""
    references: Sequence[str]
    settings: Mapping[str, Any]
    """Fields of SamplingParams that were given."""

    def stream(self, llm: LLM, **changed: Any) -> Stream:
        with sampling_flags.naming_flags(self.settings):
            return llm.stream(references=self.references, **self.question, **{**self.settings, **changed})


def _answer(job: Job, compare: bool, as_json: bool) -> None:
    """One answer, streamed; before it plain decoding's, if they are to be compared."""
    plain = None
    if compare:
        # one seed for both answers
        job = replace(job, settings={"seed": secrets.randbits(63), **job.settings})
        others = job.llm.using("plain")
        for llm in (job.llm, others):
            for _ in job.stream(llm, max_new_tokens=WARM_UP, min_new_tokens=0):
                pass
        stream = job.stream(others)
        interrupted = _show(stream, None, "running plain decoding for comparison")
        plain = stream.result
        if interrupted:
            _report(job, plain, None, as_json)
            raise KeyboardInterrupt
    stream = job.stream(job.llm)
    interrupted = _show(stream, sys.stderr if as_json else sys.stdout, "reading the prompt")
    _report(job, stream.result, plain, as_json, interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _check(samples: int, settings: Mapping[str, Any], as_json: bool, compare: bool) -> None:
    """Flags that do not go together, and those without an effect, which are noted once."""
    greedy = not settings.get("temperature")
    if "logprobs" in settings and not as_json:
        raise InvalidOption("--logprobs needs --json")
    if samples > 1 and greedy:
        raise InvalidOption(
            f"--samples {samples} needs a --temperature above 0: at temperature 0 all answers are the same"
        )
    if samples > 1 and compare:
        raise InvalidOption("--compare compares one answer; leave out --samples")
    unused = [sampling_flags.flag(name) for name in ("top_k", "top_p", "min_p", "seed") if name in settings]
    if unused and greedy:
        verb = "has" if len(unused) == 1 else "have"
        print(f"selfdraft: note: {', '.join(unused)} {verb} no effect at temperature 0", file=sys.stderr)


def _question(text: str, raw: bool, system: str | None) -> dict[str, Any]:
    """The prompt as arguments of `LLM.generate`."""
    if system is None:
        return {"prompt": text, "raw": raw}
    if raw:
        raise InvalidOption("--system needs the chat template, which --raw leaves out; give one of the two")
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]}


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InvalidPrompt("give one prompt: as the argument, as - for standard input, or with --file")
    if prompt is not None and prompt != "-":
        return prompt
    try:
        return sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPrompt(f"{file or 'standard input'} cannot be read as text: {error}") from error


def _show_samples(results: Sequence[Completion], as_json: bool) -> None:
    """Several answers to one prompt, one below the other, or as a list on the last line."""
    from .paint import figures_table

    if as_json:
        print(json.dumps([_record(result) for result in results]))
        return
    for result in results:
        print(f"--- sample {result.sample}\n{result.text}")
    figures_table(results, None)


def _show(stream: Stream, out: IO[str] | None, until_then: str) -> bool:
    """Print the text as it comes, accepted runs coloured, or nowhere; True if it was interrupted.

    until_then: what the spinner says until the first token, or to the end if the text is not shown.
    """
    from .paint import console, printer

    show = printer(out) if out else lambda chunk: None
    spinner = console(stderr=True).status(until_then)
    spinner.start()
    try:
        for chunk in stream:
            if out is not None:
                spinner.stop()
            show(chunk)
    except KeyboardInterrupt:
        return True
    finally:
        spinner.stop()
        show(None)
    return False


def _record(result: Completion) -> dict[str, object]:
    """A result for JSON."""
    return result.figures() | {"ids": list(result.ids)}


def _report(
    job: Job, result: Completion, plain: Completion | None, as_json: bool, interrupted: bool = False
) -> None:
    """The figures. If the text was interrupted, what there is is compared."""
    from .paint import figures_table, identical

    if as_json:
        record = _record(result)
        if plain is not None:
            record |= {"plain": _record(plain), "identical": identical(result, plain, interrupted)}
        print(json.dumps(record))
        return
    figures_table([plain, result] if plain else [result], plain, interrupted=interrupted)
    if not result.text and not result.chat and job.llm.tokenizer.chat_template:
        print(
            "selfdraft: note: the model ended at once; without --raw its chat template is applied",
            file=sys.stderr,
        )
