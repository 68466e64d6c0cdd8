"""Plans that people upload: data, small, and read by the same checks as any plan file."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dittools.errors import InputError, PlanError
from dittools.plans import Plan
from dittools.reading import check_file, is_plain_name, read_bytes, read_json

MOST_PLAN_BYTES = 1_000_000  # of the JSON; a plan of a 60-layer model has about 100 kB
MOST_TENSOR_BYTES = 64_000_000


def read_plan(paths: Sequence[str | Path]) -> Plan:
    """Return the plan of an upload: one .json, and its .safetensors file where it has one.

    Raises:
        InputError: no file, too many, or too large.
        PlanError: the plan is damaged, of another format, or lacks its tensors.
    """
    files = [Path(path) for path in paths]
    plans = [path for path in files if path.suffix == ".json"]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    if len(plans) != 1 or len(tensors) > 1 or len(plans) + len(tensors) != len(files):
        names = ", ".join(path.name for path in files) or "nothing"
        raise InputError(
            "no plan was uploaded", expected="one .json file, and its .safetensors", got=names
        )
    for path, most in ((plans[0], MOST_PLAN_BYTES), *((t, MOST_TENSOR_BYTES) for t in tensors)):
        try:
            check_file(path, most)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path.name} is too large or no file",
                expected=f"at most {most} bytes",
                got=str(error),
            ) from error
    with tempfile.TemporaryDirectory() as folder:
        named = _tensor_file(plans[0])
        copies = [Path(folder) / plans[0].name]
        copies[0].write_bytes(read_bytes(plans[0], MOST_PLAN_BYTES))
        # pages store uploads under names of their own, so the plan's word for the file counts
        if tensors and is_plain_name(named) and named != copies[0].name:
            (Path(folder) / named).write_bytes(read_bytes(tensors[0], MOST_TENSOR_BYTES))
        try:
            return Plan.load(copies[0])
        except PlanError as error:
            raise PlanError(str(error).replace(f"{folder}/", "")) from error


def _tensor_file(path: Path) -> str:
    """Return the name a plan gives its tensors, "" without; refuses plans that name other files."""
    try:
        content = read_json(path, MOST_PLAN_BYTES)
        rules, named = content.get("rules", []), content.get("tensors", {}).get("file", "")
        texts = [value for rule in rules for key, value in rule.get("params", {}).items()
                 if key == "tables" and isinstance(value, str) and value]  # fmt: skip
    except (OSError, ValueError, AttributeError, TypeError):
        return ""  # `Plan.load` says what is wrong, in its own words
    if texts:
        raise InputError(
            f"{path.name} names a file on the server",
            expected="calibrated tables inside the plan",
            got=repr(texts[0]),
        )
    return named if isinstance(named, str) else ""


def describe_plan(plan: Plan) -> str:
    """Return one line on a plan: rules, methods, schedule, model."""
    methods = ", ".join(dict.fromkeys(rule.method.name for rule in plan.rules)) or "dense only"
    count = len(plan.rules)
    text = f"{count} rule{'' if count == 1 else 's'}: {methods}"
    first = plan.schedule.dense_first_steps
    if first:
        text += f"; first {first:.0%} of the steps dense" if first < 1 else f"; first {first} dense"
    if plan.model is not None:
        text += f"; for {plan.model.class_name} with {plan.model.layers} layers"
    return text
