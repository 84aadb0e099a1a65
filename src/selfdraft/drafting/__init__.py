"""Finding methods by name. No method is mentioned here: built-in ones are entry points like any other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from .._common import options as reading
from ..errors import InvalidOption, UnknownMethod
from .method import Method

GROUP = "selfdraft.methods"


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def available() -> list[str]:
    """Names of the installed methods, sorted."""
    return sorted(_entries())


def drafts_early(name: str) -> bool:
    """Does the method of that name need a looped model, from whose early picks it drafts?"""
    return getattr(_entries()[name].load(), "early", False)


def create(name: str, options: Mapping[str, object] | None = None) -> Method:
    """The method of that name with its options. Raises UnknownMethod and InvalidOption."""
    if name not in _entries():
        raise UnknownMethod(f"no method {name!r}; installed: {', '.join(available())}")
    return cast(Method, reading.read(_entries()[name].load(), options or {}, f"method {name!r}"))


def resolve(method: str | Method, options: Mapping[str, object] | None = None) -> tuple[Method, str]:
    """A method given by name or as an object, and its name. Raises UnknownMethod and InvalidOption."""
    if options is not None and not isinstance(options, Mapping):
        raise InvalidOption(f"options: give a mapping of names to values; got {options!r:.100}")
    if isinstance(method, str):
        return create(method, options), method
    if isinstance(method, type) or not callable(getattr(method, "drafter", None)):
        raise InvalidOption(
            f"method: give a name ({', '.join(available())}) or an object with a `drafter` method, such as "
            f"Llma(); got {method!r:.100}"
        )
    if options:
        raise InvalidOption("options go with a method's name; this method has its own already")
    return method, type(method).__name__.lower()
