"""`selfdraft chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidOption, SelfdraftError
from . import flags, sampling_flags

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..llm import LLM
    from ..outputs import Completion

HELP = """/reference FILE  a text that answers may quote; without FILE, forget all of them
/method NAME     draft with another method; the text stays the same
/stats           figures of the last answer
/reset           begin a new conversation
/quit            leave, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    model: flags.Model = flags.DEFAULT_MODEL,
    method: flags.Method = flags.DEFAULT_METHOD,
    option: flags.MethodOptions = None,
    adapter: flags.Adapter = None,
    reference: flags.References = None,
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    temperature: sampling_flags.Temperature = None,
    top_k: sampling_flags.TopK = None,
    top_p: sampling_flags.TopP = None,
    min_p: sampling_flags.MinP = None,
    repetition_penalty: sampling_flags.RepetitionPenalty = None,
    seed: sampling_flags.Seed = None,
    max_new_tokens: sampling_flags.MaxNewTokens = 1024,
    weights: flags.Weights = None,
    activations: flags.Activations = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: flags.Numerics = None,
) -> None:
    """Talk with a model. Each answer goes on from the cache of the turn before.

    In the conversation: /reference FILE, /method NAME, /stats, /reset, /help, /quit.

    Examples:

      selfdraft chat

      selfdraft chat --reference notes.txt --system "Answer from the notes."
    """
    from .paint import console

    flags.check_text("--system", system)
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    with console(stderr=True).status(f"loading {model}"):
        llm = flags.load(model, method, option, adapter, weights, activations, dtype, device, numerics)
    if not llm.chats():
        raise InvalidOption(f"{model} has no chat template; use `selfdraft generate --raw`")
    settings = {name: value for name, value in given.items() if value is not None}
    with sampling_flags.naming_flags(settings):
        talk = Talk(llm, settings, system)
    for path in reference or ():
        talk.reference(str(path))
    print(f"{llm.name}, method {llm.method_name}; /help lists commands", file=sys.stderr)
    talk.run()


class Talk:
    """A conversation and its commands."""

    def __init__(self, llm: LLM, settings: Mapping[str, Any], system: str | None) -> None:
        """settings: sampling parameters that were given. Raises InvalidOption."""
        from ..params import SamplingParams

        self._params = SamplingParams.read(settings)
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._references: list[str] = []
        self._last: Completion | None = None
        self._llm = llm
        self._talk = self._fresh()

    def run(self) -> None:
        """Read lines until the input ends. Errors of a line are told, and the conversation goes on."""
        with suppress(ImportError):  # on Windows
            import readline  # noqa: F401 - `input` edits lines and recalls them
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            try:
                self._obey(line)
            except SelfdraftError as error:
                print(f"selfdraft: {error}", file=sys.stderr)

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not command.startswith("/"):
            if line:
                self._say(line)
        elif command == "/reference":
            self.reference(rest.strip())
        elif command == "/method":
            self._method(rest.strip())
        elif command == "/stats":
            self._stats()
        elif command == "/reset":
            self._talk.close()
            self._talk = self._fresh()
        else:
            print(HELP, file=sys.stderr)

    def reference(self, path: str) -> None:
        """Let answers quote a file; an empty path forgets all. Raises InvalidReference."""
        from ..llm import read_reference

        self._references = [*self._references, read_reference(Path(path))] if path else []

    def _fresh(self, messages: list[Any] | None = None) -> Conversation:
        from ..conversation import Conversation

        return Conversation(self._llm, self._first if messages is None else messages)

    def _method(self, name: str) -> None:
        messages = self._talk.messages
        self._llm = self._llm.using(name)
        self._talk.close()
        self._talk = self._fresh(messages)

    def _say(self, text: str) -> None:
        """One turn, streamed. An interrupted answer stays as far as it came."""
        from .paint import printer

        asked = [*self._talk.messages, {"role": "user", "content": text}]
        stream = self._talk.stream(None, self._params, messages=asked, references=self._references)
        show = printer(sys.stdout)
        try:
            for chunk in stream:
                show(chunk)
        except KeyboardInterrupt:
            pass
        finally:
            show(None)
        self._last = stream.result
        self._talk.messages = [*asked, {"role": "assistant", "content": self._last.text}]

    def _stats(self) -> None:
        from .paint import figures_table

        if self._last is None:
            print("no answer yet", file=sys.stderr)
        else:
            figures_table([self._last], None)
