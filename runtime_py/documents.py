"""Strict JSON documents: dataclasses whose last field is the document's own digest, the manifest and the pointer.

The fields' types are the schema. A reader refuses whatever it does not understand: an unknown version or field, a missing
one, a wrong type, a key that is given twice.
"""

import dataclasses
import hashlib
import json
import math
import types
from collections import Counter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from runtime_py.digests import ZEROED, Digest
from runtime_py.errors import ManifestError, UnknownFieldError, UnknownFormatVersionError

__all__ = ["FORMAT_VERSION", "MOST_LEVELS", "Json", "decode_document", "encode_document"]

FORMAT_VERSION = 1
MOST_LEVELS = 100  # of objects and lists
Json = dict[str, Any]


def encode_document(document: Any) -> bytes:
    """The JSON of a dataclass whose last field is its digest, all zeros, with that digest computed."""
    text = json.dumps(dataclasses.asdict(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    value = hashlib.sha256(text.encode()).hexdigest()
    # The digest is the last field, so that its zeros are the last 64 in the text.
    head, zeros, tail = text.rpartition("0" * 64)
    return (head + value + tail if zeros else text).encode()


def decode_document(kind: Any, data: bytes) -> Any:
    """A dataclass of the type `kind` from its JSON. Its fields' types are the schema, its last field is its digest.

    Raises:
        ManifestError: as `parse_manifest`.
    """
    digest_field = dataclasses.fields(kind)[-1].name
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
        json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is legal JSON, and no text
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"is damaged: not UTF-8 JSON: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"is damaged: expected an object, got {type(document).__name__}")
    _check_depth(document)
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnknownFormatVersionError(f"format_version is {version!r}, this reader knows {FORMAT_VERSION}")
    if digest_field in document:  # first, so that damage is not taken for what a newer writer meant
        _check_digest(data, digest_field, _decode(Digest, document[digest_field], digest_field))
    return _decode(kind, document, "")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ManifestError(f"is damaged: the key '{twice}' is given twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ManifestError(f"is damaged: {name} is no JSON number")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ManifestError(f"is damaged: {text} is beyond float64")
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, without any conversion: the types of the dataclasses are the schema."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, _expect(dict, value, where), where)
    if origin is list:
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where))]
    if hint is Any:
        return _check_any(value, where)
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {key: _decode(arguments[1], value, f"{where}.{key}") for key, value in items}
    if origin is Literal:
        if value not in arguments or type(value) is not type(arguments[0]):
            raise ManifestError(f"{where}: expected one of {list(arguments)}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(arguments[0], value, where)
    return _expect(hint, value, where)


def _check_any(value: Any, where: str) -> Any:
    """What has no type of its own may hold no larger integers than the rest."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_any(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_any(item, f"{where}[{i}]")
    elif type(value) is int:
        _expect(int, value, where)
    return value


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MOST_LEVELS):
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
    raise ManifestError(f"is damaged: nested deeper than {MOST_LEVELS}")


def _decode_dataclass(hint: Any, value: Json, where: str) -> Any:
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)]
    prefix = f"{where}." if where else ""
    unknown = [key for key in value if key not in names]
    if unknown:
        raise UnknownFieldError(
            f"unknown field '{prefix}{unknown[0]}'; format version {FORMAT_VERSION} does not define it"
        )
    missing = [name for name in names if name not in value]
    if missing:
        raise ManifestError(f"field '{prefix}{missing[0]}' is missing")
    return hint(**{name: _decode(hints[name], value[name], prefix + name) for name in names})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:  # exact: a bool is no int here
        raise ManifestError(f"{where}: expected {kind.__name__}, got {value!r}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ManifestError(f"{where}: {value} is beyond 64 bits")
    return value


def _check_digest(data: bytes, name: str, digest: Digest) -> None:
    value = digest.value.encode()
    if digest.algorithm != ZEROED or data.count(value) != 1 or len(value) != 64:
        raise ManifestError(f"is damaged: {name} must be {ZEROED} with 64 digits, got {digest}")
    computed = hashlib.sha256(data.replace(value, b"0" * 64)).hexdigest()
    if computed != digest.value:
        raise ManifestError(f"is damaged: its digest is {computed}, and it says {digest.value}")
