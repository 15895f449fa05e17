"""Typed, frozen configs: an unknown key or a wrong value is an error that names the key.

The experiments declare ml-collections ConfigDicts; `parse` turns one into the frozen models that
the code uses, before anything is compiled.
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections
import pydantic

from llama3_jax.errors import UserError


class Config(pydantic.BaseModel):
    """Base of every config: immutable, hashable, no unknown keys, no silent conversions."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Config)


def parse(cls: type[ConfigT], values: Mapping[str, Any], where: str = "config") -> ConfigT:
    """Validates `values` as `cls`.

    Raises:
      UserError: the first offending key by its full path, with the nearest valid key or the reason.
    """
    try:
        return cls.model_validate(_plain(values))
    except pydantic.ValidationError as error:
        # A misspelt key also leaves the right one missing: the misspelling is what to report.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(_describe(cls, errors[0], where)) from None


def _plain(value: Any) -> Any:
    """ConfigDicts, wherever they are nested, to dicts; placeholders to None."""
    if isinstance(value, ml_collections.FieldReference):
        return value.get()
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _describe(cls: type[Config], error: Mapping[str, Any], where: str) -> str:
    location = [part for part in error["loc"] if not _is_union_tag(part)]
    path = ".".join([where, *map(str, location)])
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(cls, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.0)
        return f"{path}: unknown key; nearest valid key: {near[0] if near else ', '.join(valid)}"
    if error["type"] == "missing":
        return f"{path}: required key is missing"
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {reason}"
    return f"{path}: {reason}, got {error['input']!r}"


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part.startswith("function-") or part[:1].isupper())


def _valid_keys(cls: type[Config], location: list[Any]) -> list[str]:
    """Keys valid at `location`, walking through nested models, tuples and dicts of models."""
    for part in location:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else cls
        cls = _inner_model(annotation) or cls
    return sorted(cls.model_fields)


def _inner_model(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _inner_model(argument):
            return found
    return None
