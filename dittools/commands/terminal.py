"""What every command shares: consoles, progress, and the reading of options."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dittools.errors import InputError
from dittools.reading import parse_json

errors = Console(stderr=True, soft_wrap=True)
console = Console()

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for machines.")]


def first_line(kind: type) -> str:
    """Return the first line of a method's module docstring, without its closing stop."""
    module = sys.modules[kind.__module__]
    return (module.__doc__ or kind.__doc__ or "").strip().splitlines()[0].rstrip(".")


def pairs(given: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE options; values are JSON where they parse as such, text otherwise."""
    found: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise InputError("--set is not usable", expected="NAME=VALUE", got=repr(item))
        try:
            found[name.strip()] = parse_json(text)
        except ValueError:
            found[name.strip()] = text
    return found


def count_or_share(value: float | None) -> float | int | None:
    """Read 3 as three steps and .25 as a quarter of them."""
    if value is None or 0 < value < 1:
        return value
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise InputError(
            "--dense-steps is not usable", expected="a count, or a share below 1", got=str(value)
        )
    return int(value)


def guidance_of(heads: str | None, weight: float | None, u: float | None) -> Any:
    """Return the HeadHunter of L0H1,L3H2 or of a plan file; None without heads.

    Raises:
        InputError: a weight without heads, a head that is none, a plan without guidance.
        PlanError: the plan file is unusable.
    """
    if heads is None:
        if weight is not None or u is not None:
            raise InputError("guidance without heads", remedy="--guidance-heads L0H1,L3H2")
        return None
    from dataclasses import replace

    from dittools.methods.headhunter import HeadHunter

    wanted = (("scale", weight), ("u", u))
    given: dict[str, Any] = {name: value for name, value in wanted if value is not None}
    if heads.endswith(".json"):
        from dittools.plans import Plan

        found = Plan.load(heads).guidance
        if found is None:
            raise InputError(f"{heads} holds no guidance", remedy="dittools search --objective ...")
        return replace(found, **given)
    return HeadHunter(tuple(part for part in heads.split(",") if part.strip()), **given)


@contextmanager
def progress() -> Iterator[Any]:
    """Yield a callback (what, done, total): a bar on a terminal, one line per run elsewhere."""
    if not errors.is_terminal:
        seen: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                errors.print(f"{what}: {total} steps", markup=False, highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=errors) as bar:
        tasks: dict[str, Any] = {}

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done)

        yield move
