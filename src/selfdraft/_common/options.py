"""Reading options that people gave, by name and often as text, into the frozen value that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from ..errors import InvalidOption

T = TypeVar("T")


def read(kind: type[T], given: Mapping[str, object], what: str) -> T:
    """An instance of a dataclass from its fields; text such as "20" is read as the field's type.

    what: whose options these are, for the message. Raises InvalidOption for a field it does not have
    or a value it cannot take.
    """
    try:
        return cast(T, _reader(cast(Any, kind)).validate_python(dict(given)))
    except ValidationError as error:
        raise _named(error, kind, what) from None


def _named(error: ValidationError, kind: type[Any], what: str) -> InvalidOption:
    first = error.errors()[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, InvalidOption):
        return own
    known = getattr(kind, "__dataclass_fields__", {})
    name = str(first["loc"][0]) if first["loc"] else ""
    if name in known:
        return InvalidOption(f"{what}, option {name!r}: {first['msg']}; got {first['input']!r}", option=name)
    return InvalidOption(f"{what}: no option {name!r}; there are {', '.join(known) or 'none'}")


@cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(with_config(ConfigDict(extra="forbid"))(kind))
