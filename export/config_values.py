"""The values of a release configuration: what a name, a number or a text in it may be."""

import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, Strict, StrictInt
from pydantic_core import PydanticCustomError

from export.storage import redact

__all__ = [
    "REFUSED",
    "Cosine",
    "Count",
    "FeatureName",
    "Float",
    "Integer",
    "Number",
    "Ratio",
    "TableName",
    "check_class_path",
    "check_json",
    "check_published",
    "check_unique",
    "error_at",
    "find_texts",
    "is_utf8",
    "one_of",
    "read_size",
]

REFUSED = "release"  # the type of the errors raised here
_MOST_LEVELS = 64  # in arguments, which lie a few levels deep in a manifest
_MODULE_DICT = torch.nn.ModuleDict()


def error_at(message: str, *at: int | str) -> PydanticCustomError:
    """To be raised by what pydantic calls: `at` leads from the section or value that it checks to the key at fault."""
    return PydanticCustomError(REFUSED, "{message}", {"message": message, "at": at})


def one_of(*built: StrEnum) -> AfterValidator:
    """Refuses what this version does not build."""

    def check(value: StrEnum) -> StrEnum:
        if value not in built:
            names = ", ".join(built)
            raise error_at(f"'{value}' is not supported by this version, which has: {names}")
        return value

    return AfterValidator(check)


def check_unique(values: list[StrEnum]) -> list[StrEnum]:
    """Refuses a list that has a value twice."""
    for value in values:
        if values.count(value) > 1:
            raise error_at(f"'{value}' is listed twice")
    return values


def check_class_path(value: str) -> str:
    """Refuses what does not name a class in a module."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise error_at(f"expected 'package.module:Class', got {value!r}")
    return value


def check_json(value: dict[str, Any]) -> dict[str, Any]:
    """What the manifest keeps: text, finite numbers, booleans, null, and lists and mappings of these."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise error_at(f"expected text, finite numbers, booleans, null, lists and mappings: {error}") from error
    return value


def check_published(value: dict[str, Any]) -> dict[str, Any]:
    """The manifest keeps arguments as they are: nothing that it has no place for, and nothing that is to stay secret."""
    for at, part in _parts(value):
        if len(at) >= _MOST_LEVELS:
            raise error_at(f"nested {len(at)} deep, at most {_MOST_LEVELS} are kept", *at[:1])
        if type(part) is int and not -(2**63) <= part < 2**63:
            raise error_at(
                f"expected an integer that fits in signed 64 bits, got {part}; write a float, or a text", *at
            )
        if isinstance(part, str) and redact(part) != part:
            raise error_at(
                "a URL with a user, a password or a query, which the manifest would publish; "
                "write it without, and let the module find its credentials where it runs",
                *at,
            )
    return value


def _parts(value: Any, *at: int | str) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    """Every key and every value that is no container, and the way to it. The key of a mapping is at the mapping."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield at, key
            yield from _parts(part, *at, key)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _parts(part, *at, number)
    else:
        yield at, value


def _check_name(name: str) -> str:
    """Table names become module names and tensor names: what `nn.ModuleDict` or safetensors refuses is refused here."""
    if not name or not name.isprintable():
        raise error_at(f"a name must be printable and not empty, got {name!r}")
    if "." in name or name == "__metadata__" or hasattr(_MODULE_DICT, name):
        raise error_at(f"{name!r} cannot name a table: torch or safetensors reserves it")
    return name


def _check_feature_name(name: str) -> str:
    if not name or not name.isprintable():
        raise error_at(f"a name must be printable and not empty, got {name!r}")
    return name


TableName = Annotated[str, AfterValidator(_check_name)]
FeatureName = Annotated[str, AfterValidator(_check_feature_name)]
# The manifest, which has the configuration, holds signed integers of 64 bits.
Integer = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Count = Annotated[StrictInt, Field(ge=1, lt=2**63)]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Ratio = Annotated[Float, Field(ge=0.0)]
Cosine = Annotated[Float, Field(ge=-1.0, le=1.0)]


def read_size(value: object) -> object:
    """Refuses numbers with a fraction, which pydantic would round, and booleans, which it would count."""
    fraction = isinstance(value, str) and "." in value and value.replace(".", "", 1).strip().isdigit()
    if isinstance(value, bool | float) or fraction:
        raise error_at(f"expected bytes, or a size with a unit such as '20 GB', got {value!r}")
    return value


def find_texts(node: Any, at: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Every text of a document, keys included, with where it is."""
    if isinstance(node, str):
        yield at, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from find_texts(key, at)
            yield from find_texts(value, (*at, key))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from find_texts(value, (*at, number))


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a half of a surrogate pair
        return False
    return True
