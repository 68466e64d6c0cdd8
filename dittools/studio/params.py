"""A method's parameters as form fields, and the form's values as parameters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from dittools.errors import InputError
from dittools.methods import METHODS, build
from dittools.reading import parse_json


@dataclass(frozen=True)
class ParamField:
    """One parameter as a form shows it.

    Attributes:
        name: of the parameter.
        kind: "flag", "choice", "share", "whole", "number" or "text"; text holds JSON, or words and
            numbers with commas between them.
        default: in the form's type.
        help: its text and limits.
        choices: of a choice.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()


def fields_of(method: str) -> list[ParamField]:
    """Return the fields of a method, in the order of its dataclass."""
    hints = get_type_hints(METHODS[method])
    found = []
    for item in fields(METHODS[method]):
        hint, facts = hints[item.name], item.metadata
        choices = tuple(facts.get("choices") or ())
        kind = _kind(hint, choices, facts)
        default = as_text(item.default) if kind == "text" else item.default
        found.append(ParamField(item.name, kind, default, _help(facts, hint, kind), choices))
    return found


def changed(method: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the parameters whose field no longer shows the default; checked by the method.

    Args:
        method: name in METHODS.
        values: of `fields_of(method)`, in that order; None or "" leaves the default.
    Raises:
        InputError: a value is not usable.
    """
    given = {}
    for field, value in zip(fields_of(method), values, strict=True):
        if value is None or (isinstance(value, str) and value.strip() == ""):
            continue
        if field.kind == "whole":
            value = _whole(field.name, value)
        elif field.kind in ("number", "share"):
            value = float(value)
        if value != field.default:
            given[field.name] = from_text(value) if field.kind == "text" else value
    build(method, given)  # the method's own checks, before anything is queued
    return given


def as_text(value: Any) -> str:
    """Return a parameter as a form shows it: full, 0.5, 0.5; empty for None and ()."""
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return ", ".join(as_text(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value)


def from_text(text: str) -> Any:
    """Read what `as_text` writes, or JSON."""
    text = text.strip()
    try:
        return parse_json(text)
    except ValueError:
        pass
    if "," in text and not text.startswith(("[", "{")):
        return [from_text(part) for part in text.split(",") if part.strip()]
    return text


def _kind(hint: Any, choices: tuple[Any, ...], facts: Any) -> str:
    if hint is bool:
        return "flag"
    if choices:
        return "choice"
    if hint is int:
        return "whole"
    if hint is float:
        lowest = facts.get("least") if facts.get("above") is None else facts["above"]
        return "share" if lowest == 0 and facts.get("most") == 1 else "number"
    return "text"


def _help(facts: Any, hint: Any, kind: str) -> str:
    """Return the help text with the limits a slider does not show."""
    text = str(facts.get("help", ""))
    words = (("least", "at least"), ("above", "above"), ("most", "at most"))
    limits = [f"{word} {facts[key]:g}" for key, word in words if facts.get(key) is not None]
    if kind != "share" and limits:
        text += f" ({', '.join(limits)})"
    return text[:1].upper() + text[1:]


def _whole(name: str, value: Any) -> int:
    if float(value) != int(value):
        raise InputError(f"{name} is not usable", expected="a whole number", got=f"{value:g}")
    return int(value)
