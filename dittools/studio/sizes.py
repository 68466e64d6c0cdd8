"""Size, steps and seed of the jobs that search, inspect and measure, and their progress."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dittools.errors import InputError
from dittools.pipelines.session import Request, check_words, settings_of
from dittools.studio.engine import Job

Number = float | str | None  # of a field: pages show no empty number, so text stands for one
MOST_PROMPTS = 64
MOST_LETTERS = 2000  # of one prompt


def settings_for(
    model: str,
    prompt: str,
    *,
    seed: Number = None,
    steps: Number = None,
    frames: Number = None,
    height: Number = None,
    width: Number = None,
) -> dict[str, Any]:
    """Return keyword settings of a generation without its prompt; what is left open is the model's.

    Raises:
        InputError: a number no model can take, or a prompt the demo model cannot read at all.
    """
    given = {"seed": seed, "steps": steps, "frames": frames, "height": height, "width": width}
    read: dict[str, Any] = {name: whole(name, value) for name, value in given.items()}
    read["seed"] = read["seed"] or 0
    request = Request(model=model.strip(), prompt=prompt, **read)
    settings = settings_of(request).to_dict()
    if request.model == "demo":
        check_words(prompt, lambda _: None)
    settings.pop("prompt")
    return settings


def number(name: str, value: Number) -> float | None:
    """Return what a field holds; None when it is empty.

    Raises:
        InputError: it is no finite number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{name} is not usable", expected="a number", got=str(value))
    return found


def whole(name: str, value: Number) -> int | None:
    """Return what a field holds as a whole number; None when it is empty.

    Raises:
        InputError: it is no whole number.
    """
    found = number(name, value)
    if found is None:
        return None
    if found != int(found):
        raise InputError(f"{name} is not usable", expected="a whole number", got=f"{found:g}")
    # not by way of a float, which holds 53 bits of a 64-bit seed
    text = str(value).strip()
    return int(text) if text.lstrip("+-").isdigit() else int(found)


def prompts_of(text: str) -> list[str]:
    """Return the prompts of a text field, one a line.

    Raises:
        InputError: there is none, there are too many, or one is too long.
    """
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError("there is no prompt", remedy="one prompt a line")
    if len(found) > MOST_PROMPTS or any(len(line) > MOST_LETTERS for line in found):
        raise InputError(
            "the prompts are too many or too long",
            expected=f"at most {MOST_PROMPTS} of {MOST_LETTERS} letters",
            got=f"{len(found)}, the longest of {max(map(len, found))} letters",
        )
    return found


class ModelCalls:
    """Turns the units a search reports into progress by model call, so that it moves all the time.

    Units that were done before cost nothing: they are taken off what is to be expected.
    """

    def __init__(self, job: Job, per_unit: int, expected: int) -> None:
        """Say how many calls one unit takes, and how many all of them take at most."""
        self._job, self._per_unit, self._expected = job, max(per_unit, 1), expected
        self._what, self._total, self._done, self._in_unit, self._units = "", 0, 0, 0, 0
        job.expect(expected)

    def report(self, what: str, done: int, total: int) -> None:
        """Take what the search reports: before its first unit, and after every one."""
        if what != self._what:
            self._what, self._total, self._done, self._units = what, 0, 0, 0
        if done == 0:
            self._total += total * self._per_unit
        elif self._in_unit == 0:  # found on disk
            self._total -= self._per_unit
            self._expected = max(self._expected - self._per_unit, 1)
            self._job.expect(self._expected)
        self._in_unit = 0
        self._tell()

    def call(self, *_: Any) -> None:
        """Count one call of the denoiser."""
        self._in_unit += 1
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        # a unit that also makes its dense reference takes twice the calls
        self._job(self._what or "looking at the model", self._done, max(self._total, self._done))


@contextmanager
def counted(pipe: Any, calls: ModelCalls) -> Iterator[None]:
    """Count the calls of a pipeline's denoisers inside the block."""
    handles = [
        part.register_forward_hook(calls.call)
        for name, part in getattr(pipe, "components", {}).items()
        if isinstance(part, torch.nn.Module) and name.startswith(("transformer", "unet"))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
