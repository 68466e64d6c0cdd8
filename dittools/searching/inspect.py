"""The head atlas as one page: click a head for its candidates, change a choice, export a plan."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dittools.errors import PlanError
from dittools.methods import to_params
from dittools.patches import detach
from dittools.plans import Plan
from dittools.searching.api import default_work, make_request
from dittools.searching.candidates import Candidate
from dittools.searching.frontier import atlas_of
from dittools.searching.measure import Bench, sites_for
from dittools.searching.page import ATLAS_SCRIPT, atlas_body, document
from dittools.searching.probe import Sites
from dittools.searching.request import DEFAULT_RANGES, Budget, budget_of
from dittools.searching.run import Report, prepare, work_folder
from dittools.searching.scout import named_backend
from dittools.searching.store import Store
from dittools.searching.table import Table, merge


def atlas(
    pipe: Any,
    prompts: Sequence[str] | str | Path,
    *,
    plan: Plan | None = None,
    methods: Sequence[str] = (),
    budget: str | Budget = "quick",
    ranges: tuple[float, ...] = DEFAULT_RANGES,
    backend: str = "auto",
    work: Path | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return the head atlas of a model: maps, bands, classes, candidates and their errors.

    Args:
        pipe: a stock pipeline; what is attached to it is taken off.
        prompts: every other one is looked at, as in a search.
        plan: its choices are shown as chosen where they are candidates; dense elsewhere.
        methods: candidates come from these, empty for all.
        budget: prompts, queries and steps looked at.
        ranges: step ranges shown apart.
        backend: a named attention backend, or "auto".
        work: folder of finished units, shared with a search.
        progress: called with (what, units done, units in all).
        **settings: height, width, frames, steps, guidance, negative_prompt, seed.
    Raises:
        PlanError: the plan was made for another model.
        AttachError, InputError: as for `search`.
    """
    request = make_request(
        pipe,
        prompts,
        target_density=1.0,
        methods=methods,
        budget=budget_of(budget),
        ranges=ranges,
        **settings,
    )
    detach(pipe)
    backend = named_backend(pipe, backend)
    facts, candidates = prepare(pipe, request)
    if plan is not None:
        plan.check(facts.model)
    store = Store(work_folder(pipe, work, backend), progress)
    limits = request.budget
    sites = sites_for(facts, ranges, limits.rows, limits.steps_per_range, request.settings.seed)
    choice = _choice(
        plan, candidates, sites, facts.model.paths
    )  # a plan that does not fit ends here
    results = Bench(pipe, store, backend).calibrate(
        request.calibration, sites, candidates, facts, None
    )
    table = merge(results, candidates, sites)
    found = atlas_of(table, choice)
    model = facts.model
    found["model"] = {
        "class": model.class_name,
        "layers": model.layers,
        "heads": model.heads,
        "head_dim": model.head_dim,
    }
    return found


def choice_of(plan: Plan | None, table: Table, paths: tuple[str, ...]) -> torch.Tensor:
    """Return int64 [L * R * H]: the candidate a plan runs at the last step of each range.

    A plan with rules for one guidance branch gives [L * R * 2 * H], cond and uncond.

    Raises:
        PlanError: it runs something that is no candidate.
    """
    return _choice(plan, table.candidates, table.sites, paths)


def _choice(
    plan: Plan | None, candidates: Sequence[Candidate], sites: Sites, paths: tuple[str, ...]
) -> torch.Tensor:
    layers, ranges, heads = sites.layers, len(sites.ranges) - 1, sites.heads
    branches = ("cond", "uncond") if plan is not None and plan.needs_branch else ("",)
    choice = torch.zeros((layers, ranges, len(branches), heads), dtype=torch.int64)
    if plan is None:
        return choice.flatten()
    names = {_key(c.method): n for n, c in enumerate(candidates)}
    steps = sites.steps
    for layer, part, place in product(range(layers), range(ranges), range(len(branches))):
        inside = [s for s in range(steps) if sites.range_of(s) == part]
        if not inside:
            continue
        path, branch = paths[layer] if paths else "", branches[place]
        rules = plan.rules_for(layer, path, inside[-1], steps, heads, branch)
        for members, method in rules:
            number = names.get(_key(method))
            if number is None:
                raise PlanError(
                    f"the plan runs {method.name} with parameters that are no candidate",
                    expected="a plan of `dittools search` at this size",
                    remedy="inspect without --plan",
                )
            choice[layer, part, place, list(members)] = number
    return choice.flatten()


def _key(method: Any) -> str:
    return f"{method.name} {to_params(method)}"


def atlas_page(found: dict[str, Any]) -> str:
    """Return the atlas as one self-contained HTML page."""
    model = found["model"]
    intro = (
        f"<p>{model['class']}: {found['layers']} layers, {found['heads']} heads. Maps show which "
        "queries (down) look at which keys (across), brighter is more; errors are relative to the "
        "dense output of the head, behind the output projection.</p>"
    )
    return document("dittools inspect", intro + atlas_body(can_export=True), found, ATLAS_SCRIPT)


def work_beside(out: Path) -> Path | None:
    """Return the work folder of a page."""
    return default_work(out)
