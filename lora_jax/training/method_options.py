"""Methods as plain data, `{"name": "lora", "rank": 8, ...}`, for YAML files and command lines; and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lora_jax.methods import Method
from lora_jax.text import clipped, nearest_name

from .errors import ConfigError


def method_class(name: object, argument: str = "method") -> type[Method]:
    """The class of a method by its name on the command line.

    Args:
        name: The method's name.
        argument: Argument that has the name, for the message.

    Raises:
        ConfigError: No method has the name; the nearest is named.
    """
    if not isinstance(name, str) or name not in Method.by_name:
        known = sorted(Method.by_name)
        near = nearest_name(name, known) if isinstance(name, str) else None
        hint = f"; the nearest is `{near}`" if near else ""
        raise ConfigError(f"`{argument}` must be one of {', '.join(known)}, got {name!r:.200}{hint}.")
    return Method.by_name[name]


def make_method(options: Mapping[str, object] | str, task: str = "classification") -> Method:
    """The method described by `{"name": ..., **fields}`, with the defaults of the method's class for the task.

    Example:
        >>> make_method({"name": "lora", "rank": 4}).rank
        4
    """
    options = {"name": options} if isinstance(options, str) else dict(options)
    cls = method_class(options.pop("name", "lora"))
    fields = [field.name for field in dataclasses.fields(cls)]
    if unknown := [key for key in options if key not in fields]:
        near = nearest_name(unknown[0], fields)
        hint = f"; the nearest is `{near}`" if near else ""
        raise ConfigError(f"`{clipped(unknown[0])}` is no option of {cls.name}{hint}. It has {', '.join(fields)}.")
    try:
        return cls.for_task(
            task, {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"`method` {cls.name}: {error}") from error


def method_name(method: object) -> str:
    """A method's name on the command line.

    Raises:
        ConfigError: It is no method, or one whose class has no `name`.
    """
    if isinstance(method, Method) and method.name:
        return method.name
    raise ConfigError(
        f"`method` must be a method with a name, one of {', '.join(sorted(Method.by_name))}, got a "
        f"{type(method).__name__}."
    )


def method_options(method: object) -> dict[str, object]:
    """The inverse of `make_method`, with values of the types that YAML and JSON have."""
    name = method_name(method)
    assert isinstance(method, Method)
    return {"name": name} | {
        field.name: _plain(field.name, getattr(method, field.name)) for field in dataclasses.fields(method)
    }


def default_learning_rate(method: object, task: str = "classification") -> float:
    """The peak learning rate of AdamW where none is given: `Method.learning_rate` of a method with a name."""
    method_name(method)
    assert isinstance(method, Method)
    return method.learning_rate(task)


def _plain(name: str, value: object) -> object:
    if callable(value):
        raise ConfigError(f"`{name}` is a function, which a file can't hold: name the leaves instead.")
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(name, item) for item in value]
    return value
