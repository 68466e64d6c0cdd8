"""What a search does not look at twice, and what a density is asked of."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.methods import build
from dittools.methods.clustered import Clustered
from dittools.methods.metered import Metered
from dittools.plans import ModelFacts
from dittools.searching.candidates import Candidate, candidates_for, measured
from dittools.searching.cost import flops_table
from dittools.searching.measure import Score, _whole, turns
from dittools.searching.probe import Probe, Sites
from dittools.searching.request import Constraints
from dittools.searching.rows import sample_rows
from dittools.searching.rowwise import RowBackend
from dittools.searching.solver import Solver
from dittools.searching.table import Table, flat_weights, merge, plan_of, survivors
from dittools.searching.verify import Trial
from dittools.searching.weigh import Sensitivity, factors

GRID = TokenGrid(4, 6, 6)
FACTS = ModelFacts("X", 1, 2, 16)


def _sites(sampled: set[int], passed: frozenset[str] = frozenset()) -> Sites:
    rows = sample_rows(GRID.total, 36, 0)
    return Sites(GRID, 1, 2, (0.0, 0.5, 1.0), 8, frozenset(sampled), rows, passed)


def _seen(candidates: list[Candidate]) -> Table:
    probe = Probe(_sites({0, 4}), candidates, [None])
    for step in (0, 4):
        generator = torch.Generator().manual_seed(step)
        q, k, v = torch.randn(3, 1, GRID.total, 2, 16, generator=generator).unbind()
        call = AttentionCall(3 * q, k, v, GRID, step=step, steps=8, branch="cond")
        probe.attend(call, load("reference"))
        probe.attend(replace(call, branch="uncond"), load("reference"))
    return merge([probe.results()], candidates, probe.sites)


def _solver(table: Table) -> Solver:
    return Solver(table, flat_weights(table), flops_table(GRID, 2, 16), Constraints(), FACTS)


def test_two_prompts_look_at_the_steps_of_a_range_by_turns() -> None:
    one, two, three = turns(_sites({0, 1, 2, 3, 5, 6}), 3)
    assert (one.sampled, two.sampled) == ({0, 2, 5}, {1, 3, 6})
    assert three.sampled == one.sampled
    assert turns(_sites({0, 3, 5}), 1)[0].sampled == {0, 3, 5}  # the only prompt sees all
    assert [s.sampled for s in turns(_sites({1, 5}), 2)] == [{1, 5}] * 2  # one step in a range


def test_a_branch_that_is_passed_over_is_answered_dense_and_not_counted() -> None:
    probe = Probe(_sites({0}, frozenset({"uncond"})), candidates_for(GRID, ["gna"]), [None])
    q, k, v = torch.randn(3, 1, GRID.total, 2, 16).unbind()
    call, backend = AttentionCall(q, k, v, GRID, steps=8, branch="uncond"), load("reference")
    assert torch.equal(probe.attend(call, backend), backend.dense(call))
    assert not probe.calls.any()
    probe.attend(replace(call, branch="cond"), backend)
    assert probe.calls.sum() == 1


@pytest.mark.parametrize(
    "ladder",
    [
        ("metered", {"keys": "alike", "rows": 8}),
        ("metered", {"keys": "order"}),
        ("clustered", {"partition": "split"}),
        ("clustered", {"partition": "profile"}),
    ],
)
def test_densities_of_one_method_look_at_a_call_once_and_find_the_same(
    ladder: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, form = ladder
    sizes = {
        "metered": {"order": "fhw", "probes": 16},
        "clustered": {"key_block": 8, "least_queries": 16, "least_keys": 8, "probes": 8},
    }[name]
    made = [build(name, {"density": d, **form, **sizes, "block_size": 16}) for d in (0.1, 0.3)]
    looks = {"metered": (Metered, "scores"), "clustered": (Clustered, "_labels")}[name]
    plain, calls = getattr(*looks), []
    monkeypatch.setattr(*looks, lambda *args: calls.append(1) or plain(*args))
    memories: list[list[dict[str, object]]] = [[{}, {}], [{}, {}]]
    for step in (0, 3):
        q, k, v = (3 * torch.randn(3, 1, GRID.total, 2, 16)).unbind()
        call = AttentionCall(q, k, v, GRID, step=step, steps=8)
        rows = torch.arange(0, GRID.total, 5)
        shared = RowBackend(load("reference"), call, rows)
        outs = []
        for place, method in enumerate(made):
            own = RowBackend(load("reference"), call, rows)
            shared.forget()
            out = method.attend(replace(call, memory=memories[0][place]), shared)
            outs.append(out.clone())
            alone = method.attend(replace(call, memory=memories[1][place]), own)
            assert torch.equal(outs[-1][:, rows], alone[:, rows])
        assert not torch.equal(outs[0][:, rows], outs[1][:, rows])
    assert len(calls) == 2 * (1 + 2)  # per step: once for both, once for each alone


def test_candidates_dealt_out_to_two_generations_are_measured_as_by_one() -> None:
    candidates = candidates_for(GRID, ["gna", "sparse_vdit", "paro"])
    sites, q = _sites({0, 4}), torch.randn(3, 1, GRID.total, 2, 16)
    shares = [None, tuple(range(1, len(candidates), 2)), tuple(range(2, len(candidates), 2))]
    whole, *parts = (Probe(sites, candidates, [None], None, some) for some in shares)
    for probe in (whole, *parts):
        for step in (0, 4):
            call = AttentionCall(*(3 * q * (1 + step)).unbind(), GRID, step=step, steps=8)
            probe.attend(call, load("reference"))
    found = _whole([p.results() for p in parts])
    for name, tensor in whole.results().items():
        assert torch.allclose(found[name], tensor, rtol=1e-5), name
    assert not torch.equal(parts[0].results()["error"], whole.results()["error"])


def test_heads_that_keep_together_are_kept_in_mind_and_searched_alone() -> None:
    names = candidates_for(GRID, ["metered", "gna"])
    table = _seen([c for c in names if c.method.name in ("dense", "metered") or c.density < 0.5])
    together = {n for n, c in enumerate(table.candidates) if c.together}
    assert together & set(survivors(table))
    joint = table.joint()
    assert joint is not None
    assert set(joint.active.nonzero().flatten().tolist()) == {0} | together
    assert replace(table, active=table.active & ~joint.active).joint() is None
    for rule in _solver(joint).solve(0.85).plan.rules:
        assert rule.heads == "all"


def test_what_is_dear_in_time_does_not_survive_a_search_for_a_speedup() -> None:
    """Cheap by pairs and nearly free of error, but it takes long to choose."""
    names = candidates_for(GRID, ["gna", "sparse_vdit", "vmoba"])
    table = _seen(names)
    slow = [n for n, c in enumerate(table.candidates) if c.method.name == "vmoba"]
    table.error[..., slow] *= 1e-3
    assert set(survivors(table)) & set(slow)
    dear = replace(_solver(table), by_time=True)
    times, using = (torch.ones_like(t) for t in dear._prices)
    times[..., :] = table.executed()
    using[:] = 0.0
    using[:, slow] = 6.0  # per layer, so 3 per head, next to 1 of dense
    dear.__dict__["_prices"] = (times, using)
    assert torch.allclose(dear.prices()[..., slow], table.executed()[..., slow] + 3.0)
    kept = survivors(table, dear.prices())
    assert kept
    assert not set(kept) & set(slow)
    assert torch.equal(replace(dear, by_time=False).prices(), table.executed())


def test_layers_and_ranges_are_told_apart_by_one_generation_each() -> None:
    generator = torch.Generator().manual_seed(0)
    error, layer, part = (
        torch.rand(shape, generator=generator).double() + 0.1 for shape in ((5, 4), (5,), (4,))
    )
    harm = layer[:, None] * part * error
    found = factors(error, harm.sum(dim=1), harm.sum(dim=0))
    assert torch.allclose(found, layer[:, None] * part)
    by_layer = harm.sum(dim=1)
    by_layer[2] = 0.0  # not looked at: between its neighbours, in logarithms
    found = factors(error, by_layer, harm.sum(dim=0))
    ratio = found[:, 0] / found[0, 0]
    assert float(ratio[2]) == pytest.approx(float((ratio[1] * ratio[3]).sqrt()))
    assert bool((factors(error, by_layer * 0, by_layer[:4] * 0) == 1).all())


def test_only_a_layer_or_only_a_range_can_be_sparse() -> None:
    table = _seen(candidates_for(GRID, ["gna"]))
    choice = torch.ones(4, dtype=torch.int64)
    assert [r.steps for r in plan_of(table, choice, FACTS).rules] == ["all"]
    assert [r.steps for r in plan_of(table, choice, FACTS, only=(None, 1)).rules] == [(0.5, 1.0)]
    assert [r.steps for r in plan_of(table, choice, FACTS, only=(0, None)).rules] == ["all"]
    assert plan_of(table, choice, FACTS, only=(1, None)).rules == ()


def test_a_density_is_asked_of_what_is_worked_through() -> None:
    """A mask that keeps few pairs of many blocks is no cheaper than one that keeps them whole."""
    dense = candidates_for(GRID, ["gna"])[0]
    cut, whole = (
        measured(build(*how), GRID)
        for how in (
            ("gna", {"window": ("full", 3, 3), "stride": 1, "block_size": 64}),
            ("gna", {"window": (0.5, "full", "full"), "block_size": 16}),
        )
    )
    assert cut is not None
    assert whole is not None
    assert cut.density < whole.density <= whole.computed < cut.computed
    table = _seen([dense, cut, whole])
    solver = _solver(table)
    for budget in (whole.computed, 0.9):
        found = solver.solve(budget)
        assert found.density <= found.executed <= budget + 1e-9
    assert solver.solve(whole.computed).choice.tolist() == [2] * 4
    assert survivors(replace(table, error=torch.ones_like(table.error)), most=1) == [2]


def test_what_a_verified_plan_worked_through_follows_what_it_kept() -> None:
    found = _solver(_seen(candidates_for(GRID, ["clear"]))).solve(0.9)
    assert found.executed > found.density
    score = Score((30.0,), (0.9,), (0.001,), found.density * 1.1)
    assert Trial(0.9, found, 30.0, score).executed == pytest.approx(found.executed * 1.1)


def test_layers_and_parts_of_a_run_are_flattened_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    flat, layer, part = (
        torch.rand(shape, generator=generator).double() + 0.1
        for shape in ((3, 4, 2), (3, 1, 2), (1, 4, 1))
    )
    measured_ = Sensitivity(flat * layer * part, (0, 1, 2))
    assert torch.allclose(measured_.blended(flat, (1.0, 1.0)), measured_.weight)
    layers_only = measured_.blended(flat, (1.0, 0.0)) / flat
    assert torch.allclose(
        layers_only / layers_only[:1, :, :1], (layer / layer[0, 0, 0]).expand(3, 4, 2)
    )
    half = measured_.blended(flat, (0.0, 0.5)) / flat
    assert torch.allclose(half / half[:, :1], (part / part[0, 0]).sqrt().expand(3, 4, 2))
    split = flat.repeat_interleave(2, dim=1)  # of two branches, which were not told apart
    both = measured_.blended(split, (1.0, 1.0))
    assert torch.allclose(both, measured_.weight.repeat_interleave(2, dim=1))
