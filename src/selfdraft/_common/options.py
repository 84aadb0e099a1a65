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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(getattr(kind, "__dataclass_fields__", {})) or "none"
        raise InvalidOption(
            f"{what}, option {where!r}: {first['msg']}, got {first['input']!r}; its options: {known}"
        ) from None


@cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(with_config(ConfigDict(extra="forbid"))(kind))
