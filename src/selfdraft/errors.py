"""Every error a user can cause, in one tree. The message says what was given and what to do.

SelfdraftError
├── InvalidOption        a value no setting can have (negative counts, NaN temperature, unknown option)
├── InvalidPrompt        an empty prompt, or one that does not fit the context
├── InvalidReference     a reference that cannot be read
├── DraftError           a drafter raised an error; it is the cause
│   └── InvalidTree      a drafter proposed something that is not a tree of this text
├── StopError            what watches for the end of a text raised an error; it is the cause
├── GrammarError         a grammar's matcher contradicts itself
├── NotFinite            NaN or infinity in the model's weights or in what it computed
├── KVMemoryExhausted    a text that the memory for keys and values does not hold
├── QueueFull            as many requests wait as may
├── EngineClosed         a request to an engine that has been closed, or whose process died
├── UnknownMethod        no drafting method of that name
├── ModelError
│   ├── ModelNotFound    no such folder or hub id
│   ├── ModelCorrupt     files are there but cannot be loaded, or weights are missing
│   └── ModelUnsupported the model loads but cannot verify a tree, or not exactly
├── AdapterError         an adapter that is missing, damaged, or of another model
├── InvalidSuite         a benchmark set that is unknown, out of reach, or has a row without a field
├── BenchError           a benchmark run that cannot be kept: another run's folder, a full disk
│   ├── PeerUnavailable  another engine that is not installed, or cannot run the model
│   └── PeerFailed       another engine whose process died or answered nonsense
└── TrainingDataError    data that cannot be used or kept: missing columns, damaged, of another model

Broken invariants of our own are assertions, not members of this tree.
"""


class SelfdraftError(Exception):
    """Base of all errors that this package raises on purpose."""


class InvalidOption(SelfdraftError, ValueError):
    """An option has a value that cannot be honoured."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option
        """Name of the option, where the error is about one."""


class InvalidPrompt(SelfdraftError, ValueError):
    """The prompt is empty or does not fit the model's context."""


class InvalidReference(SelfdraftError, ValueError):
    """A reference text cannot be read."""


class DraftError(SelfdraftError):
    """A drafter failed. Only its own request ends."""


class InvalidTree(DraftError, ValueError):
    """A drafter proposed rows that do not form a tree under the last token."""


class NotFinite(SelfdraftError, ArithmeticError):
    """The model computed NaN or infinity for a token of the text, so there is no next one."""


class GrammarError(SelfdraftError):
    """The library that follows a grammar rejects a token that it had allowed. Only its own request ends."""


class StopError(SelfdraftError):
    """A stopping criterion failed. Only its own request ends."""


class KVMemoryExhausted(SelfdraftError, MemoryError):
    """The memory for keys and values does not hold a text, even alone."""


class QueueFull(SelfdraftError):
    """As many requests wait as may; try again later."""


class EngineClosed(SelfdraftError):
    """The engine takes no requests any more: it was closed, or its process died."""


class UnknownMethod(SelfdraftError, LookupError):
    """No drafting method of that name is installed."""


class ModelError(SelfdraftError):
    """A model cannot be used."""


class ModelNotFound(ModelError, LookupError):
    """There is no such model folder or hub id."""


class ModelCorrupt(ModelError):
    """The model's files are there but cannot be loaded whole."""


class ModelUnsupported(ModelError):
    """The model loads, but cannot do what was asked of it."""


class AdapterError(SelfdraftError):
    """An adapter is missing or does not fit the model."""


class InvalidSuite(SelfdraftError, ValueError):
    """A benchmark set is unknown, cannot be read, or has a row that lacks a field."""


class BenchError(SelfdraftError):
    """A benchmark run cannot be written or continued."""


class PeerUnavailable(BenchError):
    """Another engine is not installed where it is looked for, or cannot run the model."""


class PeerFailed(BenchError):
    """Another engine's process died, or answered what is no answer."""


class TrainingDataError(SelfdraftError, ValueError):
    """Training data cannot be read, written or continued, or are another model's."""
