"""What all configurations have in common: JSON, dotted overrides, one error for every wrong field."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmdiff_cache.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound="Config")


def data_folder() -> Path:
    """Where stores lie by default: $MMDIFF_DATA, or data/ in the current folder."""
    return Path(os.environ.get("MMDIFF_DATA") or "data")


class Config:
    """Base of all configurations: JSON, dotted overrides, one error for every wrong field."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; tuples become lists, paths become text."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=os.fspath))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build from JSON values. Raises ConfigError on an unknown key or a value of the wrong type."""
        return typing.cast(C, _build(cls, values, where=cls.__name__))

    def override(self: C, assignments: Mapping[str, str]) -> C:
        """Apply `--set` assignments such as `{"aggregator.layer_scale": "1e-4"}`: JSON or bare text."""
        values = self.to_json()
        for dotted, text in assignments.items():
            node, *parents = values, *dotted.split(".")[:-1]
            for parent in parents:
                if parent in node and node[parent] is None:  # a group that was left to its defaults
                    node[parent] = {}
                if not isinstance(node.get(parent), dict):
                    raise ConfigError(f"--set {dotted}: {type(self).__name__} has no group {parent!r}")
                node = node[parent]
            node[dotted.split(".")[-1]] = _parse_text(text)
        return type(self).from_json(values)


def _parse_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.split(",") if "," in text else text


def _build(cls: type[Any], values: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is a group of fields, {', '.join(fields)}; got {values!r}")
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    missing = [name for name, f in fields.items() if name not in values and _has_no_default(f)]
    if missing:
        raise ConfigError(f"{where} needs a value for {missing[0]!r}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _has_no_default(field_: "dataclasses.Field[Any]") -> bool:
    return field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Turn a JSON value into what a field's annotation says, or raise a ConfigError that names the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        items = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        if arguments[0] in (int, float):  # '0.26,0.52' was split, not read: block addresses may be numbers
            items = [_parse_text(item) if isinstance(item, str) else item for item in items]
        if arguments[0] is str:  # ... and '11' was read: a block address all the same
            items = [str(item) if type(item) is int else item for item in items]
        return tuple(_convert(arguments[0], item, where) for item in items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping of names to values, got {value!r}")
        return {key: _convert(arguments[1], item, where) for key, item in dict(value).items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(typing.cast(type, hint), value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def filled(value: T | None) -> T:
    """A field of a resolved configuration; `resolve` leaves None only where None has a meaning of its own."""
    assert value is not None
    return value


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
