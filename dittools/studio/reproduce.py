"""The exact command line and Python that make a run again."""

import json
import shlex
from pathlib import Path
from typing import Any

from dittools.methods import build, to_params

_LOAD = (("dtype", "auto"), ("device", "cpu"))  # what `load` takes, and its default


def command_line(facts: dict[str, Any], plan: Path | None) -> str:
    """Return the `dittools generate` line of a run.

    Args:
        facts: of the run: model, settings, method, params, dense_steps, dense_layers, repeats,
            device, dtype.
        plan: the plan file, where the run was made from one.
    """
    given: list[tuple[str, Any]] = [("model", facts["model"]), *facts["settings"].items()]
    if plan is not None:
        given.append(("plan", plan))
    elif facts["method"]:
        given.append(("method", facts["method"]))
    given += [("set", f"{name}={json.dumps(value)}") for name, value in facts["params"].items()]
    given += [(name, facts[name]) for name in ("dense_steps", "dense_layers")]
    given += [("compare", ""), ("repeats", facts["repeats"])]
    given += [(name, facts[name]) for name, usual in _LOAD if facts[name] != usual]
    given.append(("out", "out/again"))
    words = ["dittools", "generate"]
    for name, value in given:
        option, text = f"--{name.replace('_', '-')}", str(value)
        if value is None:
            continue
        if text.startswith("-"):  # as one word, or it would be read as an option
            words.append(f"{option}={text}")
        else:
            words += [option, text] if text else [option]
    return shlex.join(words)


def python_snippet(facts: dict[str, Any], plan: Path | None) -> str:
    """Return a script that makes both clips of a run and prints the report."""
    settings = {name: value for name, value in facts["settings"].items() if value is not None}
    options = {n: facts[n] for n in ("dense_steps", "dense_layers") if facts[n] is not None}
    place = [repr(facts["model"])]
    place += [f"{name}={facts[name]!r}" for name, usual in _LOAD if facts[name] != usual]
    extra = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"""import dittools
from dittools.pipelines.generate import Settings, generate

pipe = dittools.pipelines.load({", ".join(place)})
settings = Settings(
{"".join(f"    {name}={value!r},{chr(10)}" for name, value in settings.items())})
dense = generate(pipe, settings)
with dittools.attach(pipe, {_target(facts, plan)}{extra}) as handle:
    accelerated = generate(pipe, settings)
    print(handle.report())
"""


def _target(facts: dict[str, Any], plan: Path | None) -> str:
    if plan is not None:
        return repr(str(plan))
    if facts["params"]:
        made = build(facts["method"], facts["params"])
        known = to_params(made)
        given = ", ".join(f"{name}={known[name]!r}" for name in facts["params"])
        return f'dittools.METHODS["{facts["method"]}"]({given})'
    return repr(facts["method"])
