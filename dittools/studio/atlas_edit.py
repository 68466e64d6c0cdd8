"""A head atlas being edited: which candidate every head runs, and the plan that makes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

from dittools.errors import InputError
from dittools.methods import build
from dittools.plans import ModelFacts, Plan, Rule
from dittools.reading import misfit, read_json

SCOPES = ("this head", "the whole layer", "every head of this class")
EVERY = -1  # stands for all step ranges
Pair = tuple[int, int]  # candidates of the cond and the uncond branch
Run = tuple[int, tuple[int, ...], tuple[int, int]]  # candidate, heads, (first, last) step range
Branch = Literal["all", "cond", "uncond"]
MOST_ATLAS_BYTES = 128_000_000  # 40 layers, 40 heads and 4 step ranges take 15 MB
_CELL = {
    **dict.fromkeys(("layer", "range", "head", "choice"), int),
    "class": str,
    "bands": [float],
    "choices?": [int],
    "error": [(float, None)],
    "map": [int],
}
_ATLAS = {
    **dict.fromkeys(("layers", "heads"), int),
    "ranges": [float],
    "range_steps": [int],
    "bands": [str],
    "uniform": [float],
    "candidates": [{"name": str, "method": str, "params": (dict, None), "density": float}],
    "cells": [_CELL],
    "model": {"class": str, **dict.fromkeys(("layers", "heads", "head_dim"), int)},
}


@dataclass(frozen=True)
class AtlasEdit:
    """An atlas and the choices on it; editing returns a new one.

    Attributes:
        found: the atlas, as `searching.inspect.atlas` returns it.
        choice: candidates of the (cond, uncond) guidance branches per cell, in the order of the
            atlas; a search may choose them apart, an edit sets both.
        name: run it came from, for the plan's provenance.
    """

    found: dict[str, Any]
    choice: tuple[Pair, ...]
    name: str = ""

    @staticmethod
    def start(found: dict[str, Any], name: str = "") -> "AtlasEdit":
        """Return an atlas with the choices it came with."""
        return AtlasEdit(found, tuple(_pair(cell) for cell in found["cells"]), name)

    @property
    def parts(self) -> list[int]:
        """Step ranges that hold a step of the run."""
        return [part for part, steps in enumerate(self.found["range_steps"]) if steps]

    @property
    def edited(self) -> frozenset[int]:
        """Cells whose choice is no longer the one the atlas came with."""
        cells = self.found["cells"]
        return frozenset(n for n, pair in enumerate(self.choice) if pair != _pair(cells[n]))

    def index(self, layer: int, head: int, part: int) -> int:
        """Return the place of a cell.

        Raises:
            InputError: the atlas has no such layer, head or step range.
        """
        ranges, heads = len(self.found["ranges"]) - 1, self.found["heads"]
        limits = ((layer, self.found["layers"]), (head, heads), (part, ranges))
        if not all(0 <= value < limit for value, limit in limits):
            raise InputError("the atlas has no such head", got=f"layer {layer}, head {head}")
        return int((layer * ranges + part) * heads + head)

    def density(self) -> float:
        """Return the mean share of query-key pairs of the choices over the run."""
        weights = self.found["range_steps"]
        pairs = [
            (weights[cell["range"]], self.found["candidates"][candidate]["density"])
            for cell, pair in zip(self.found["cells"], self.choice, strict=True)
            for candidate in pair
        ]
        return float(sum(w * d for w, d in pairs) / sum(w for w, _ in pairs))

    def reach(self, layer: int, head: int, part: int, scope: str, every_range: bool) -> list[int]:
        """Return the cells a choice acts on: a head, its layer, or all heads of its class.

        A class is compared at the step range that is open.
        """
        self.index(layer, head, part)
        kind = self.found["cells"][self.index(layer, head, part)]["class"]
        chosen = {
            (one, other)
            for one in range(self.found["layers"])
            for other in range(self.found["heads"])
            if (one, other) == (layer, head)
            or (scope == SCOPES[1] and one == layer)
            or (
                scope == SCOPES[2]
                and self.found["cells"][self.index(one, other, part)]["class"] == kind
            )
        }
        parts = self.parts if every_range else [part]
        return sorted(self.index(one, other, p) for one, other in chosen for p in parts)

    def with_choice(self, cells: Sequence[int], candidate: int) -> "AtlasEdit":
        """Return the atlas with a candidate on some cells.

        Raises:
            InputError: there is no such candidate, or it cannot run there.
        """
        known = self.found["candidates"]
        if not 0 <= candidate < len(known):
            raise InputError("the atlas has no such candidate", got=str(candidate))
        reason = self.refusal(candidate, cells)
        if reason:
            raise InputError(f"{known[candidate]['name']} cannot be chosen", got=reason)
        chosen = list(self.choice)
        for cell in cells:
            chosen[cell] = (candidate, candidate)
        return replace(self, choice=tuple(chosen))

    def refusal(self, candidate: int, cells: Sequence[int]) -> str:
        """Return why a candidate cannot be chosen on some cells; empty when it can."""
        if self.found["candidates"][candidate]["params"] is None:
            return "its parameters are tensors, which only a search can store"
        if any(self.found["cells"][cell]["error"][candidate] is None for cell in cells):
            return "it cannot run on this head"
        return ""

    def restored(self, cells: Sequence[int]) -> "AtlasEdit":
        """Return the atlas with some cells as they came."""
        chosen = list(self.choice)
        for cell in cells:
            chosen[cell] = _pair(self.found["cells"][cell])
        return replace(self, choice=tuple(chosen))


def _pair(cell: dict[str, Any]) -> Pair:
    """Return the candidates of a cell's branches; `choices` is there where they differ."""
    cond, uncond = cell.get("choices") or (cell["choice"], cell["choice"])
    return int(cond), int(uncond)


def plan_of(edit: AtlasEdit) -> Plan:
    """Return the plan of the choices; dense needs no rule.

    Neighbouring step ranges, and layers that treat the same heads alike, share a rule.

    Raises:
        InputError: a choice the atlas came with has tensors for parameters.
    """
    groups: dict[tuple[Run, Branch], list[int]] = {}
    for layer in range(edit.found["layers"]):
        cond, uncond = _runs(edit, layer, 0), _runs(edit, layer, 1)
        named: list[tuple[Run, Branch]] = [(r, "all" if r in uncond else "cond") for r in cond]
        named += [(r, "uncond") for r in uncond if r not in cond]
        for key in named:
            groups.setdefault(key, []).append(layer)
    everyone = edit.found["heads"]
    rules = tuple(
        Rule(
            _method(edit, candidate),
            layers=tuple(layers),
            heads="all" if len(heads) == everyone else heads,
            steps=_steps(edit, span),
            branch=branch,
        )
        for ((candidate, heads, span), branch), layers in sorted(
            groups.items(), key=lambda g: (g[1], g[0])
        )
    )
    model = edit.found["model"]
    return Plan(
        rules,
        model=ModelFacts(model["class"], model["layers"], model["heads"], model["head_dim"]),
        provenance={"by": "edited in the dittools studio", "atlas": edit.name},
    )


def _runs(edit: AtlasEdit, layer: int, branch: int) -> list[Run]:
    """Return what runs in a layer on one branch, dense left out."""
    found: list[Run] = []
    parts = edit.parts
    for place, part in enumerate(parts):
        chosen = [
            edit.choice[edit.index(layer, h, part)][branch] for h in range(edit.found["heads"])
        ]
        for candidate in sorted(set(chosen) - {0}):
            heads = tuple(h for h, c in enumerate(chosen) if c == candidate)
            before = parts[place - 1] if place else None
            same = [
                n
                for n, (c, m, span) in enumerate(found)
                if (c, m) == (candidate, heads) and span[1] == before
            ]
            if same:
                found[same[0]] = (candidate, heads, (found[same[0]][2][0], part))
            else:
                found.append((candidate, heads, (part, part)))
    return found


def _steps(edit: AtlasEdit, span: tuple[int, int]) -> Literal["all"] | tuple[float, float]:
    """Return the share of the run a span covers, ranges without a step behind it included."""
    parts, edges = edit.parts, edit.found["ranges"]
    following = [part for part in parts if part > span[1]]
    start, stop = edges[span[0]], edges[following[0]] if following else edges[-1]
    return "all" if (start, stop) == (0, 1) else (start, stop)


def _method(edit: AtlasEdit, candidate: int) -> Any:
    entry = edit.found["candidates"][candidate]
    if entry["params"] is None:
        raise InputError(
            f"{entry['name']} cannot be stored from the atlas",
            got="parameters that are tensors",
            remedy="another choice for its heads, or the plan of the search itself",
        )
    return build(entry["method"], entry["params"])


def read_atlas(path: Path) -> dict[str, Any]:
    """Return the atlas of a file.

    Raises:
        InputError: it cannot be read, or is no atlas with a model.
    """
    try:
        found = read_json(path, MOST_ATLAS_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the atlas {path.name}",
            got=getattr(error, "strerror", None) or "no JSON",
            remedy="make the atlas again",
        ) from error
    wrong = misfit(found, _ATLAS, "the atlas")
    if wrong:
        raise InputError(f"{path.name} is no head atlas", got=wrong)
    count = found["layers"] * found["heads"] * (len(found["ranges"]) - 1)
    if len(found["cells"]) != count or min(found["layers"], found["heads"], count) < 1:
        raise InputError(
            f"{path.name} is incomplete", expected=f"{count} cells", got=str(len(found["cells"]))
        )
    wrong = _disagreement(found)
    if wrong:
        raise InputError(f"{path.name} does not agree with itself", got=wrong)
    return dict(found)


def _disagreement(found: dict[str, Any]) -> str:
    """Return the first part of an atlas that does not fit the others, "" where all do."""
    edges, steps, known = found["ranges"], found["range_steps"], len(found["candidates"])
    if len(steps) != len(edges) - 1 or min(steps) < 0 or not any(steps):
        return "steps of the ranges"
    if edges[0] != 0 or edges[-1] != 1 or any(a >= b for a, b in pairwise(edges)):
        return "edges of the ranges"
    if len(found["bands"]) != len(found["uniform"]):
        return "bands"
    sizes = product(range(found["layers"]), range(len(steps)), range(found["heads"]))
    for place, cell in zip(sizes, found["cells"], strict=True):
        chosen = cell.get("choices") or [cell["choice"]] * 2
        side = math.isqrt(len(cell["map"]))
        if (
            place != (cell["layer"], cell["range"], cell["head"])
            or len(chosen) != 2
            or not all(0 <= candidate < known for candidate in (*chosen, cell["choice"]))
            or len(cell["error"]) != known
            or len(cell["bands"]) != len(found["bands"])
            or side < 1
            or side * side != len(cell["map"])
            or not all(0 <= level <= 255 for level in cell["map"])
        ):
            return "the cell of layer {}, step range {}, head {}".format(*place)
    return ""
