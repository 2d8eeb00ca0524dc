"""Reads a task-level evaluation: what some outside script measured of models that use the tables, before and after."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints, ValidationError, model_validator

from export.errors import ConfigError

__all__ = ["read_evaluation"]

_Name = Annotated[str, StringConstraints(min_length=1, strict=True)]
_Value = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Metric(_Part):
    name: _Name
    better: Literal["lower", "higher"]
    unit: Annotated[str, StringConstraints(strict=True)] = ""


class _Row(_Part):
    name: _Name
    bytes: Annotated[StrictInt, Field(ge=0)]
    values: dict[str, _Value]


class _Evaluation(_Part):
    """The first row is the baseline."""

    task: _Name
    metrics: Annotated[list[_Metric], Field(min_length=1)]
    rows: Annotated[list[_Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        metrics = [metric.name for metric in self.metrics]
        for what, names in (("metrics", metrics), ("rows", [row.name for row in self.rows])):
            for name, times in Counter(names).items():
                if times > 1:
                    raise ValueError(f"{what}: '{name}' is listed {times} times")
        for row in self.rows:
            if set(row.values) != set(metrics):
                raise ValueError(f"rows: '{row.name}' has values of {sorted(row.values)}, expected {sorted(metrics)}")
        return self


def read_evaluation(path: Path) -> dict[str, Any]:
    """The document {task, metrics: [{name, better, unit}], rows: [{name, bytes, values: {metric: number}}]}.

    Raises:
        ConfigError: the file is unreadable or no such document; where, and what is expected.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _Evaluation.model_validate(document).model_dump()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{path}: {where + ': ' if where else ''}{_text(problem['msg'])}; {_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not UTF-8 JSON: {error}; {_EXPECTED}") from error


_EXPECTED = (
    'expected an evaluation: {"task": name, "metrics": [{"name", "better": "lower" or "higher", "unit"}], '
    '"rows": [{"name", "bytes", "values": {metric: number}}]}, the baseline first'
)


def _text(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
