"""Reads release configurations from YAML.

Every error carries the file, the line, the key and, for an unknown key, the nearest known one.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from export.config import ReleaseConfig
from export.config_values import REFUSED
from export.errors import ConfigError

__all__ = ["load_config"]


def load_config(path: str | Path) -> ReleaseConfig:
    """Reads a release configuration.

    Relative paths in it are relative to its own folder, and absolute in the result.

    Raises:
        ConfigError: the file is unreadable, is no YAML mapping, or does not fit the model. Each problem is one line
            `file:line: key: what is wrong`.
    """
    path = Path(path)
    try:
        document = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = ", ".join(str(part).splitlines()[0] for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except (RecursionError, ValueError) as error:  # nested without end, or a number of thousands of digits
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(ReleaseConfig.model_fields)}")
    try:
        plain = _plain(document)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        config = ReleaseConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(path, document, error))) from error
    return _with_absolute_paths(config, path)


def _plain(node: Any) -> Any:
    """YAML nodes without the round-trip types, which pydantic's strict integers do not know."""
    if isinstance(node, TaggedScalar) and str(node.tag) == "tag:yaml.org,2002:str":
        return str(node.value)
    if isinstance(node, ScalarBoolean):  # with an anchor: an int, and no bool
        return bool(node)
    if isinstance(node, Mapping):
        plain = {}
        for key, value in node.items():
            if str(key) in plain:
                raise ValueError(f"the key '{key}' is given twice, once as text")
            plain[str(key)] = _plain(value)
        return plain
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _describe(path: Path, document: Any, error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if part != "[key]"]
        message = problem["msg"]
        if problem["type"] == REFUSED:
            location += problem.get("ctx", {}).get("at", ())
        elif problem["type"] == "extra_forbidden":
            message = f"unknown key; {_nearest_key(location)}"
        elif not isinstance(problem["input"], Mapping | list):
            message += f", got {problem['input']!r}"
        key = ""
        for part in location:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        yield f"{path}:{_line(document, location)}: {key}: {message}" if key else f"{path}: {message}"


def _nearest_key(location: Sequence[int | str]) -> str:
    """A hint for an unknown key, the last part of `location`."""
    section: Any = _inner(ReleaseConfig)
    for part in location[:-1]:
        if get_origin(section) in (list, dict):
            section = _inner(get_args(section)[-1])
        elif str(part) in getattr(section, "model_fields", {}):
            section = _inner(section.model_fields[part].annotation)
    known = getattr(section, "model_fields", {})
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"


def _inner(annotation: Any) -> Any:
    """What an annotation is about, without Annotated and None."""
    while get_origin(annotation) not in (None, list, dict):
        annotation = next(argument for argument in get_args(annotation) if argument is not type(None))
    return annotation


def _line(document: Any, location: Sequence[int | str]) -> int:
    """The line (from 1) of the deepest part of the location that the document has."""
    line = 1
    node: Any = document
    for part in location:
        try:
            marks = node.lc
            if isinstance(node, list):
                place, node = marks.item(part), node[int(part)]
            else:
                key = next(key for key in node if str(key) == str(part))
                place, node = marks.key(key), node[key]
            line = place[0] + 1
        except (KeyError, IndexError, TypeError, AttributeError, StopIteration):
            break
    return line


def _with_absolute_paths(config: ReleaseConfig, path: Path) -> ReleaseConfig:
    def absolute(uri: str, key: str) -> str:
        try:
            return uri if "://" in uri else str((path.absolute().parent / Path(uri).expanduser()).resolve())
        except (RuntimeError, ValueError) as error:  # no such user, or a NUL
            raise ConfigError(f"{path}: {key}: {uri!r} is no path: {error}") from error

    tables = []
    for number, table in enumerate(config.large_embeddings.tables):
        if table.pretrained is not None:
            key = f"large_embeddings.tables[{number}].pretrained.embedding_snapshot_uri"
            uri = absolute(table.pretrained.embedding_snapshot_uri, key)
            pretrained = table.pretrained.model_copy(update={"embedding_snapshot_uri": uri})
            table = table.model_copy(update={"pretrained": pretrained})
        for key in ("vocab", "access_counts"):
            section = getattr(table, key)
            if section is not None:
                uri = absolute(section.uri, f"large_embeddings.tables[{number}].{key}.uri")
                table = table.model_copy(update={key: section.model_copy(update={"uri": uri})})
        tables.append(table)
    return config.model_copy(
        update={
            "large_embeddings": config.large_embeddings.model_copy(update={"tables": tables}),
            "snapshot": config.snapshot.model_copy(update={"uri": absolute(config.snapshot.uri, "snapshot.uri")}),
        }
    )
