"""`selfdraft generate`: one answer, streamed, with its figures."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidOption, InvalidPrompt
from . import flags

if TYPE_CHECKING:
    from ..llm import Stream
    from ..params import Completion

SAMPLING, ENDS = "Sampling", "Where the text ends"
Text = Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.", show_default=False)]


def generate(
    prompt: Text = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    model: flags.Model = "pico",
    method: flags.Method = "llma",
    option: flags.MethodOptions = None,
    adapter: flags.Adapter = None,
    reference: flags.References = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens to add at most.")
    ] = 256,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a user's message: use the tokenizer's chat template."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: a system message before it.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.", rich_help_panel=SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Keep the most likely tokens that reach this mass.", rich_help_panel=SAMPLING),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(help="Keep tokens this likely, relative to the likeliest.", rich_help_panel=SAMPLING),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(help="Divide logits of tokens in prompt or answer; 1: off.", rich_help_panel=SAMPLING),
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Take off logits of tokens in the answer.", rich_help_panel=SAMPLING)
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, for each time they occur.", rich_help_panel=SAMPLING)
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="ID=VALUE, added to a logit; -inf bans it; repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed, same text; random and reported by default.", rich_help_panel=SAMPLING),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1, help="Answers to the prompt; --json gives a list then.", rich_help_panel=SAMPLING
        ),
    ] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that ends the answer, left out of it; $'\\n' in bash is a line break; repeatable.",
            rich_help_panel=ENDS,
        ),
    ] = None,
    eos: Annotated[
        list[int] | None,
        typer.Option(help="Token id that ends it, instead of the model's; repeatable.", rich_help_panel=ENDS),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="No token id ends it.", rich_help_panel=ENDS)
    ] = False,
    min_new_tokens: Annotated[
        int, typer.Option(help="Tokens to add before it may end.", rich_help_panel=ENDS)
    ] = 0,
    logprobs: Annotated[
        int | None,
        typer.Option(help="Report each token's, and those of so many alternatives (with --json)."),
    ] = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: flags.Numerics = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run plain decoding beside it.")] = False,
    as_json: flags.Json = False,
) -> None:
    """Generate text.

    The text is the model's own, whatever the method: a draft only decides how many tokens one
    forward yields. --compare shows it: plain decoding, the speed-up, and whether the texts are identical.

    Examples:

      selfdraft generate "def fibonacci(n):" --compare

      selfdraft generate --file prompt.txt --reference old.py --method llma --json

      echo "def mean(values):" | selfdraft generate - --temperature 0.8 --seed 7

      selfdraft generate "# Sorting" --stop "def " --repetition-penalty 1.1 -t 0.8 --samples 3
    """
    from ..llm import load, read_reference

    text = _prompt(prompt, file)
    if logprobs is not None and not as_json:
        raise InvalidOption("--logprobs goes with --json")
    if system is not None and not chat:
        raise InvalidOption("--system goes with --chat")
    if samples > 1 and compare:
        raise InvalidOption("--compare takes one sample; leave out --samples")
    references = [read_reference(path) for path in reference or ()]
    generator = load(
        model,
        method,
        options=flags.pairs("--option", option),
        adapter=adapter,
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": flags.pairs("--logit-bias", logit_bias),
        "stop": tuple(stop or ()),
        "eos": tuple(eos) if eos else None,
        "ignore_eos": ignore_eos,
        "min_new_tokens": min_new_tokens,
        "logprobs": logprobs,
    }
    asked = generator.ids(None, _messages(text, system)) if chat else generator.ids(text)
    if samples > 1:
        _samples(generator.generate(asked, n=samples, references=references, **settings, seed=seed), as_json)
        return
    plain = None
    if compare:
        seed = secrets.randbits(63) if seed is None else seed
        short = {"max_new_tokens": min(8, max_new_tokens), "min_new_tokens": 0}
        for arm in (generator, generator.using("plain")):  # the first forwards of a shape are slower
            arm.generate(asked, references=references, **{**settings, **short})
        other = generator.using("plain").stream(asked, **settings, seed=seed)
        interrupted = _show(other, None)
        plain = other.result
        if interrupted:
            _report(plain, None, as_json)
            raise KeyboardInterrupt
    stream = generator.stream(asked, references=references, **settings, seed=seed)
    interrupted = _show(stream, sys.stderr if as_json else sys.stdout)
    _report(stream.result, plain, as_json, interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InvalidPrompt("give one prompt: as the argument, as - for standard input, or with --file")
    if prompt is not None and prompt != "-":
        return prompt
    try:
        return sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPrompt(f"{file or 'standard input'} cannot be read as text: {error}") from error


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    above = [] if system is None else [{"role": "system", "content": system}]
    return [*above, {"role": "user", "content": text}]


def _samples(results: Sequence[Completion], as_json: bool) -> None:
    """Several answers to one prompt, one below the other, or as a list on the last line."""
    from .paint import figures_table

    if as_json:
        print(json.dumps([result.figures() for result in results]))
        return
    for result in results:
        print(f"--- sample {result.sample}\n{result.text}")
    figures_table(results, None)


def _show(stream: Stream, out: IO[str] | None) -> bool:
    """Print the text as it comes, accepted runs coloured, or nowhere; was it interrupted?"""
    from .paint import printer

    show = printer(out) if out else lambda chunk: None
    try:
        for chunk in stream:
            show(chunk)
    except KeyboardInterrupt:
        return True
    finally:
        show(None)
    return False


def _report(result: Completion, plain: Completion | None, as_json: bool, interrupted: bool = False) -> None:
    """The figures. Of an interrupted text, what there is is compared."""
    from .paint import figures_table, identical

    if as_json:
        record = result.figures()
        if plain is not None:
            record |= {"plain": plain.figures(), "identical": identical(result, plain, interrupted)}
        print(json.dumps(record))
    else:
        figures_table([plain, result] if plain else [result], plain, interrupted=interrupted)
