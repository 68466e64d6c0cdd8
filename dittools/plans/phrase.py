"""A method in words: its name and the parameters that differ from the defaults."""

import json
from dataclasses import fields
from typing import Any

import torch

from dittools.methods import Method, to_params


def phrase(method: Method) -> str:
    """Return a method and the parameters that differ from its defaults."""
    kind: Any = type(method)
    defaults = {f.name: f.default for f in fields(kind)}
    changed = {
        name: value
        for name, value in to_params(method).items()
        if _differs(getattr(method, name), defaults.get(name))
    }
    inside = ", ".join(f"{k}={_short(v)}" for k, v in changed.items())
    return f"{method.name}({inside})"


def _differs(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return True
    return bool(value != default)


def _short(value: Any) -> str:
    return json.dumps(value, default=lambda v: f"tensor {tuple(getattr(v, 'shape', ()))}")
