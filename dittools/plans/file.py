"""Plan files: JSON with a checked format and version, tensors in a safetensors file beside it.

A plan is data: reading one runs nothing, opens no file outside its folder, and ends in a plan or in
a PlanError, UnknownMethod or InputError.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dittools.errors import DitToolsError, PlanError
from dittools.methods import METHODS, build, to_params
from dittools.methods.headhunter import HeadHunter
from dittools.methods.paro_tables import load_tables
from dittools.plans.plan import ModelFacts, Plan, Rule, Schedule
from dittools.reading import MOST_TENSORS, beside, read_bytes, read_json, read_tensors

FORMAT = "dittools-plan"
VERSION = 1
_KEYS = (
    "format",
    "version",
    "model",
    "schedule",
    "rules",
    "guidance",
    "tensors",
    "provenance",
    "measured",
)
_MODEL = ("class", "layers", "heads", "head_dim")
_SCHEDULE = ("dense_first_steps", "dense_last_steps", "dense_layers")
_GUIDANCE = ("heads", "scale", "u", "mode")
_RULE = ("layers", "heads", "steps", "branch", "method", "params")
_TENSORS = ("file", "sha256")
_FILES = {"tables": load_tables}  # parameters that may name a file; plans hold its content
MOST_BYTES = 16_000_000  # of the JSON; a plan of a 60-layer model has about 100 kB
_REBUILD = "make the plan again, or copy it whole"


def save_plan(plan: Plan, path: Path) -> Path:
    """Write a plan and the tensors of it and of its methods; both files appear whole or not at all.

    Raises:
        PlanError: the folder cannot be written to, or a method is not one of METHODS.
    """
    tensors = dict(plan.tensors)
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if plan.model is not None:
        facts = plan.model
        values = (facts.class_name, facts.layers, facts.heads, facts.head_dim)
        content["model"] = dict(zip(_MODEL, values, strict=True))
    content["schedule"] = {name: getattr(plan.schedule, name) for name in _SCHEDULE}
    content["rules"] = [_rule_out(n, rule, tensors) for n, rule in enumerate(plan.rules)]
    if plan.guidance is not None:
        shown = {name: getattr(plan.guidance, name) for name in _GUIDANCE}
        content["guidance"] = {**shown, "heads": list(plan.guidance.heads)}
    side, blob = path.with_suffix(".safetensors"), b""
    if tensors:
        blob = _tensor_bytes(tensors)
        content["tensors"] = {"file": side.name, "sha256": hashlib.sha256(blob).hexdigest()}
    content["provenance"] = dict(plan.provenance)
    content["measured"] = dict(plan.measured)
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PlanError(f"the plan holds something JSON cannot: {error}") from error
    if tensors:
        _write(side, blob)
    _write(path, (text + "\n").encode())
    return path


def load_plan(path: Path) -> Plan:
    """Return the plan of a file; see `Plan.load`."""
    content = _read(path)
    if content.get("format") != FORMAT:
        raise PlanError(
            f"{path} is not a plan", expected=f"format {FORMAT!r}", got=repr(content.get("format"))
        )
    if content.get("version") != VERSION or content.get("version") is True:
        raise PlanError(
            f"{path} has another version",
            expected=f"version {VERSION}",
            got=repr(content.get("version")),
            remedy="a dittools of the version that wrote it",
        )
    _only(content, _KEYS, f"{path}")
    tensors = _tensors_in(content.get("tensors"), path)
    rules = content.get("rules")
    if not isinstance(rules, list):
        raise PlanError(f"{path} holds no rules", expected="a list", got=repr(rules))
    used: set[str] = set()
    plan_rules = tuple(_rule_in(n, rule, tensors, used, path) for n, rule in enumerate(rules))
    return Plan(
        plan_rules,
        Schedule(**_part(content, "schedule", _SCHEDULE, path)),
        _model_in(content.get("model"), path),
        {name: tensor for name, tensor in tensors.items() if name not in used},
        _part(content, "provenance", None, path),
        _part(content, "measured", None, path),
        guidance=_guidance_in(content, path),
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, or say why there is none."""
    try:
        content = read_json(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise PlanError(
            f"no plan file at {path}", remedy=f"a method name: {', '.join(METHODS)}"
        ) from error
    except OSError as error:
        raise PlanError(f"cannot read {path}", got=error.strerror or str(error)) from error
    except ValueError as error:
        raise PlanError(
            f"{path} is damaged or cut short",
            expected="JSON",
            got=str(error),
            remedy=_REBUILD,
        ) from error
    if not isinstance(content, dict):
        raise PlanError(f"{path} is not a plan", expected="a JSON object", remedy=_REBUILD)
    return content


def _only(content: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(content) - set(allowed))
    if unknown:
        raise PlanError(
            f"{where} has unknown keys",
            expected=", ".join(allowed),
            got=", ".join(unknown),
            remedy="remove them, or a newer dittools",
        )


def _part(
    content: dict[str, Any], name: str, allowed: tuple[str, ...] | None, path: Path
) -> dict[str, Any]:
    """Return one object of the plan, empty when it is left out."""
    part = content.get(name, {})
    if not isinstance(part, dict):
        raise PlanError(f"{name} of {path} is malformed", expected="an object", got=repr(part))
    if allowed is not None:
        _only(part, allowed, f"{name} of {path}")
    return part


def _model_in(content: Any, path: Path) -> ModelFacts | None:
    if content is None:
        return None
    model = _part({"model": content}, "model", _MODEL, path)
    numbers = [model.get(name) for name in _MODEL[1:]]
    if not isinstance(model.get("class"), str) or not all(type(n) is int for n in numbers):
        raise PlanError(
            f"model of {path} is malformed",
            expected="a class name and whole numbers for layers, heads, head_dim",
            got=repr(model),
        )
    return ModelFacts(model["class"], model["layers"], model["heads"], model["head_dim"])


def _guidance_in(content: dict[str, Any], path: Path) -> HeadHunter | None:
    if content.get("guidance") is None:
        return None
    part = _part(content, "guidance", _GUIDANCE, path)
    try:
        return HeadHunter(**part)
    except (DitToolsError, TypeError) as error:
        raise PlanError(f"guidance of {path}: {error}") from error


def _rule_out(number: int, rule: Rule, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if rule.method.name not in METHODS:
        raise PlanError(
            f"method {rule.method.name!r} cannot be stored in a plan",
            expected=f"one of {', '.join(METHODS)}",
        )
    params = {}
    for name, value in to_params(rule.method).items():
        if name in _FILES and isinstance(value, str) and value:
            value = _FILES[name](value).to_param()
        params[name] = _value_out(value, f"rules.{number}.{name}", tensors)
    choice = {name: getattr(rule, name) for name in ("layers", "heads", "steps")}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in choice.items()}
    if rule.branch != "all":  # left out otherwise: older plans and most new ones have none
        plain["branch"] = rule.branch
    return {**plain, "method": rule.method.name, "params": params}


def _value_out(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a parameter as JSON values; tensors, in objects too, go to the side file."""
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):
        return {name: _value_out(part, f"{key}.{name}", tensors) for name, part in value.items()}
    return value


def _value_in(value: Any, tensors: dict[str, torch.Tensor], used: set[str], where: str) -> Any:
    """Undo `_value_out`."""
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        if not isinstance(value["tensor"], str) or value["tensor"] not in tensors:
            raise PlanError(f"{where} lacks tensor {value['tensor']!r}", remedy=_REBUILD)
        used.add(value["tensor"])
        return tensors[value["tensor"]]
    return {name: _value_in(part, tensors, used, where) for name, part in value.items()}


def _rule_in(
    number: int, content: Any, tensors: dict[str, torch.Tensor], used: set[str], path: Path
) -> Rule:
    where = f"rule {number} of {path}"
    if not isinstance(content, dict) or not isinstance(content.get("method"), str):
        raise PlanError(f"{where} is malformed", expected="an object that names a method")
    _only(content, _RULE, where)
    params = content.get("params", {})
    if not isinstance(params, dict):
        raise PlanError(f"params of {where} are malformed", expected="an object", got=repr(params))
    filled = {name: _value_in(value, tensors, used, where) for name, value in params.items()}
    for name in set(filled) & set(_FILES):
        if isinstance(filled[name], str) and filled[name]:
            filled[name] = _file_in(name, filled[name], path, where)
    given = {name: content.get(name, "all") for name in ("layers", "heads", "steps", "branch")}
    choice: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return Rule(
            build(content["method"], filled),
            **choice,
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    except DitToolsError as error:
        raise type(error)(f"{where}: {error}") from error


def _file_in(name: str, value: str, path: Path, where: str) -> Any:
    """Return what a file beside the plan holds, for a parameter that names one."""
    try:
        return _FILES[name](beside(path, value))
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    except ValueError as error:
        raise PlanError(
            f"{name} of {where} names a file elsewhere",
            expected="a file in the plan's folder, or what it holds",
            got=str(error),
        ) from error


def _tensor_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    blob: bytes = save(ready)
    return blob


def _tensors_in(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the side file after comparing its checksum."""
    if content is None:
        return {}
    part = _part({"tensors": content}, "tensors", _TENSORS, path)
    name = part.get("file")
    try:
        side = beside(path, name)
        if side.suffix != ".safetensors":
            raise ValueError(f"{name!r} has another suffix")
    except ValueError as error:
        raise PlanError(
            f"tensors of {path} are malformed",
            expected="the name of a .safetensors file in the same folder",
            got=str(error),
        ) from error
    try:
        blob = read_bytes(side, MOST_TENSORS)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"the tensors of {path} are missing",
            expected=str(side),
            got=getattr(error, "strerror", None) or str(error),
            remedy="copy both files",
        ) from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest != part.get("sha256"):
        raise PlanError(
            f"{side} is damaged or belongs to another plan",
            expected=f"sha256 {part.get('sha256')}",
            got=digest,
            remedy=_REBUILD,
        )
    try:
        return read_tensors(blob)[0]
    except ValueError as error:
        raise PlanError(f"{side} is damaged", got=str(error), remedy=_REBUILD) from error


def _write(path: Path, blob: bytes) -> None:
    """Write a file under its final name only when it is whole."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(blob)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PlanError(
            f"cannot write {path}: {error.strerror or error}", remedy="a folder you may write to"
        ) from error
