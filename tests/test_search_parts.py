"""The parts of a search: rows of masks, the probe's errors, the allocator, the cost table."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels import Backend, load
from dittools.methods import METHODS, build
from dittools.methods.base import block_for, tell
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch
from dittools.plans import ModelFacts
from dittools.searching.allocate import Problem, Unreachable, allocate, within_memory
from dittools.searching.atlas import band_keys, band_shares, head_class
from dittools.searching.candidates import Candidate, candidates_for
from dittools.searching.cost import CostTable, flops_table, measure_costs
from dittools.searching.ladders import ladders_for
from dittools.searching.probe import Probe, Sites
from dittools.searching.request import Constraints
from dittools.searching.rows import mask_rows, masked_output, sample_rows, weights
from dittools.searching.rowwise import RowBackend, rows_in
from dittools.searching.solver import Solver
from dittools.searching.table import (
    Table,
    flat_weights,
    merge,
    plan_of,
    problem_of,
    reuse_neighbours,
    survivors,
)

GRID = TokenGrid(5, 6, 7, text_after=3)
METHODS_SEEN = [
    build("gna", {"window": ("full", 3, 3), "stride": 1, "block_size": 16}),
    build("gna", {"window": (3, "full", 0.5), "block_size": 32}),
    build("sparse_vdit", {"mode": "multi_diagonal", "density": 0.3, "block_size": 16}),
    build("sparse_vdit", {"mode": "stripe", "density": 0.3, "block_size": 16}),
    build("radial", {"block_size": 16}),
]


def _call(grid: TokenGrid = GRID, heads: int = 2, layer: int = 0, step: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(layer * 10 + step)
    q, k, v = torch.randn(3, 1, grid.total, heads, 16, generator=generator).unbind()
    return AttentionCall(3 * q, k, v, grid, layer=layer, step=step, steps=4, branch="cond")


@pytest.mark.parametrize("method", METHODS_SEEN, ids=lambda m: f"{m.name}")
def test_rows_of_a_mask_are_those_of_its_dense_form(method: object) -> None:
    mask = method.mask(GRID)  # type: ignore[attr-defined]
    rows = torch.arange(GRID.total)
    assert torch.equal(mask_rows(mask, rows), mask.to_dense()[:, rows])


def test_rows_follow_an_order_and_a_mask_per_head() -> None:
    mask = build("random", {"density": 0.3, "block_size": 16}).mask(GRID, 3)  # type: ignore[attr-defined]
    rows = sample_rows(GRID.total, 40, seed=1)
    assert rows.unique().numel() == 40
    assert int(rows.max()) < GRID.total
    assert torch.equal(mask_rows(mask, rows), mask.to_dense()[:, rows])


@pytest.mark.parametrize("method", METHODS_SEEN, ids=lambda m: f"{m.name}")
def test_masked_rows_equal_the_backend(method: object) -> None:
    call, mask = _call(), method.mask(GRID)  # type: ignore[attr-defined]
    rows = torch.arange(0, GRID.total, 7)
    q, k, v = (t[0].transpose(0, 1) for t in (call.query, call.key, call.value))
    weight, _ = weights(q[:, rows], k, 0.25, None)
    got = masked_output(weight, mask_rows(mask, rows), v)
    want = load("reference").block_sparse(call, mask)[0].transpose(0, 1)[:, rows]
    assert torch.allclose(got, want, atol=1e-5)


def test_masked_rows_survive_a_row_whose_best_keys_are_dropped() -> None:
    weight = torch.tensor([[[1.0, 1e-30, 1e-30]]])
    kept = torch.tensor([[[False, True, True]]])
    value = torch.tensor([[[5.0], [1.0], [3.0]]])
    assert torch.allclose(masked_output(weight, kept, value), torch.tensor([[[2.0]]]))


CHOOSERS = [
    build("paro", {"density": 0.3, "block_size": 16, "per_head": True}),
    build("psa", {"block_size": 16}),
    build("rectified", {"density": 0.3, "block_size": 16}),
    build("sparge", {"density": 0.4, "block_size": 16}),
    build("svg", {"density": 0.4, "block_size": 16, "sink": False}),
    build("vmoba", {"top_k": 0.3, "block_size": 16}),
    build("vmoba", {"top_k": 0.3, "block_size": 16, "pooled": True}),
    build("metered", {"density": 0.3, "block_size": 16, "mode": "pooled", "probes": 0}),
    build("metered", {"density": 0.3, "block_size": 16}),  # mended by rows of its own
    build("clustered", {"density": 0.3, "probes": 16}),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", [*METHODS_SEEN, *CHOOSERS], ids=lambda m: f"{m.name}")
def test_sampled_rows_are_those_of_the_whole_call(method: object, batch: int) -> None:
    one = _call()
    grown = (torch.cat([t, t.flip(1)][:batch]) for t in (one.query, one.key, one.value))
    q, k, v = grown
    call = replace(one, query=q, key=k, value=v)
    rows = sample_rows(GRID.total, 20, seed=2)
    sampled = RowBackend(load("reference"), call, rows)
    got = method.attend(replace(call, memory={}), sampled)  # type: ignore[attr-defined]
    whole = Meter(load("reference"), call, lambda: load("reference").dense(call), Stopwatch())
    want = method.attend(replace(call, memory={}), whole)  # type: ignore[attr-defined]
    assert torch.allclose(got[:, rows], want[:, rows], atol=1e-5)
    assert float(sampled.kept.mean()) == pytest.approx(float(whole.density(call)), abs=1e-6)


class _ReadsUnasked:
    """Passes on what a backend gives for a query it never asked about."""

    name = "reads"

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        mask = METHODS_SEEN[0].mask(GRID)  # type: ignore[attr-defined]
        return backend.block_sparse(call, mask).roll(1, dims=1)


def test_rows_nobody_asked_for_never_pass_for_good_ones() -> None:
    candidates = [Candidate(build("dense"), None, 1.0, 1.0, 0)]
    candidates.append(Candidate(_ReadsUnasked(), None, 1.0, 1.0, 0))
    probe = _probe(candidates, [None], 40)
    probe.attend(_call(), load("reference"))
    assert probe.error[0, :, 0, :, 1].max() == float("inf")


def test_a_call_looked_at_in_chunks_of_rows_is_no_earlier_call_of_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = build("metered", {"density": 0.3, "block_size": 16, "recall": 4})
    candidates = [Candidate(m, None, 1.0, 1.0, 0) for m in (build("dense"), method)]
    found = []
    for chunk in (128, 20):
        monkeypatch.setattr("dittools.searching.probe.CHUNK", chunk)
        probe = _probe(candidates, [None], 40)
        for step in (0, 3):
            probe.attend(_call(step=step), load("reference"))
        found.append(probe.error)
    assert float(found[0][..., 1].sum()) > 0
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_exact_rows_are_found_among_the_queries(batch: int) -> None:
    query = torch.randn(batch, 50, 3, 16)
    rows = torch.tensor([3, 11, 49])
    assert torch.equal(rows_in(query[:, rows], query), rows)  # type: ignore[arg-type]
    other = query[:, rows].clone()
    other[-1, 1, 2, 15] += 1  # one channel of one head
    assert rows_in(other, query) is None
    assert rows_in(query[:, rows, :2], query) is None


def test_what_a_method_has_to_say_of_a_trial_reaches_the_report_of_the_run() -> None:
    call = _call()
    meter = Meter(load("reference"), call, lambda: call.query, Stopwatch())
    tell(RowBackend(meter, call, torch.arange(4)), "ran dense")
    assert meter.notes == ["ran dense"]


def test_metered_comes_pooled_and_mended_and_under_one_threshold_for_single_runs() -> None:
    found = ladders_for("metered", TokenGrid(7, 16, 16))
    made: list[Any] = [ladder.make(0.3) for ladder in found]
    assert [(m.mode, m.keys, m.per_head) for m in made] == [
        (mode, keys, per_head)
        for per_head in (True, False)
        for mode, keys in (("pooled", "order"), ("repair", "order"), ("repair", "alike"))
    ]
    assert [m.key_block for m in made if m.keys == "alike"] == [made[0].block_size // 2] * 2
    assert [ladder.alone for ladder in found] == [not m.per_head for m in made]
    assert {(m.density, m.block_size) for m in made} == {(0.3, block_for(TokenGrid(7, 16, 16)))}
    assert [bool(m.probes) for m in made] == [m.mode == "repair" for m in made]
    candidates: list[Any] = candidates_for(TokenGrid(7, 16, 16), ["metered"])[1:]
    for per_head in (True, False):
        chosen = [c.method for c in candidates if c.method.per_head == per_head]
        assert len({m.density for m in chosen}) >= 3
        assert {(m.mode, m.keys) for m in chosen} >= {("repair", "alike")}
    assert [c.together for c in candidates] == [not c.method.per_head for c in candidates]


def test_a_method_that_splits_heads_is_counted_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build("svg", {"density": 0.4, "block_size": 16, "sink": False})
    call = _call()
    kind = torch.tensor([True, False])
    monkeypatch.setattr(type(method), "temporal_heads", lambda *_: kind)
    sampled = RowBackend(load("reference"), call, torch.arange(20))
    method.attend(call, sampled)
    spatial, temporal = (m.density for m in method.masks(GRID))  # type: ignore[attr-defined]
    assert sampled.kept.tolist() == pytest.approx([temporal, spatial])
    assert (sampled.kept > 0).all()


def test_every_head_keeps_a_share_of_its_own() -> None:
    call = _call()
    sampled = RowBackend(load("reference"), call, torch.arange(20))
    for head, density in ((0, 0.2), (1, 0.7)):
        part = call.heads([head])
        method = build("random", {"density": density, "block_size": 16})
        sampled.block_sparse(part, method.mask(GRID))  # type: ignore[attr-defined]
    want = [
        build("random", {"density": d, "block_size": 16}).mask(GRID).density for d in (0.2, 0.7)
    ]  # type: ignore[attr-defined]
    assert sampled.kept.tolist() == pytest.approx(want)


def _probe(candidates: list[Candidate], gains: list[torch.Tensor | None], rows: int) -> Probe:
    sites = Sites(
        GRID,
        1,
        2,
        (0.0, 0.5, 1.0),
        4,
        frozenset({0, 3}),
        sample_rows(142, rows, 0) if rows < GRID.total else torch.arange(GRID.total),
    )
    return Probe(sites, candidates, gains)


def test_the_probe_measures_what_the_backend_would_do_and_answers_dense() -> None:
    candidates = candidates_for(GRID, ["gna", "vmoba"] if "vmoba" in METHODS else ["gna"])
    projection = torch.randn(2, 16, 16)
    gain = projection.transpose(1, 2) @ projection
    probe = _probe(candidates, [gain], GRID.total)
    call, backend = _call(step=3), load("reference")
    out = probe.attend(call, backend)
    assert torch.equal(out, backend.dense(call))
    assert not probe.error[0, 0].any()  # the range of steps 0 and 1 has seen nothing yet
    for number in (0, 1, 5, len(candidates) - 1):
        other = candidates[number].method.attend(call, backend)
        away = torch.einsum("nhd,hod->nho", (other - out)[0], projection)
        want = away.double().square().sum(dim=(0, 2)) / GRID.total
        assert torch.allclose(probe.error[0, 1, 0, :, number], want, rtol=1e-3, atol=1e-9)
    assert float(probe.bands[0, 1].sum()) > 0


def test_a_probe_of_few_rows_ranks_candidates_as_all_rows_do() -> None:
    candidates = candidates_for(GRID, ["gna"])
    found = []
    for rows in (48, GRID.total):
        probe = _probe(candidates, [None], rows)
        probe.attend(_call(step=0), load("reference"))
        found.append(probe.error[0, 0, 0].sum(dim=0)[1:])
    assert float(torch.corrcoef(torch.stack(found).log())[0, 1]) > 0.95


def test_carried_errors_reach_the_next_call() -> None:
    candidates = candidates_for(GRID, ["gna"])
    probe = Probe(_probe(candidates, [None], 48).sites, candidates, [None], carry=1e6)
    call = _call(step=0)
    cheapest = min(range(len(candidates)), key=lambda n: candidates[n].density)
    want = candidates[cheapest].method.attend(call, load("reference"))
    assert torch.allclose(probe.attend(call, load("reference")), want, atol=1e-6)


def test_candidates_are_relative_to_the_grid_and_never_repeat() -> None:
    found = candidates_for(TokenGrid(12, 12, 12))
    assert found[0].method.name == "dense"
    assert len({c.name for c in found}) == len(found)
    assert {"gna", "radial", "sta", "sparse_vdit"} <= {c.method.name for c in found}
    assert min(c.density for c in found[1:] if c.mask is not None) < 0.15
    with pytest.raises(InputError, match="unknown method"):
        candidates_for(GRID, ["nonsense"])


def _problem(seed: int, items: int = 5, count: int = 4, distinct: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand((items, count), generator=generator, dtype=torch.float64)
    loss = (1 - cost) ** 2 * torch.rand((items, 1), generator=generator, dtype=torch.float64)
    cost[:, 0], loss[:, 0] = 1.0, 0.0
    allowed = torch.ones_like(loss, dtype=torch.bool)
    return Problem(loss, cost, torch.tensor([0, 0, 0, 1, 1][:items]), allowed, distinct)


@pytest.mark.parametrize("seed", range(6))
def test_the_allocator_is_close_to_the_best_of_all_choices(seed: int) -> None:
    problem = _problem(seed)
    for budget in (1.8, 2.6, 3.5):
        fits = [
            problem.total_loss(torch.tensor(c))
            for c in itertools.product(range(4), repeat=5)
            if problem.total_cost(torch.tensor(c)) <= budget
        ]
        if not fits:
            with pytest.raises(Unreachable):
                allocate(problem, budget)
            continue
        choice = allocate(problem, budget)
        assert problem.total_cost(choice) <= budget + 1e-9
        worst_step = float(problem.loss.max(dim=1).values.max())
        assert problem.total_loss(choice) <= min(fits) + 0.5 * worst_step


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("extra", ["", "opening", "using"])
def test_items_of_a_group_take_a_joint_candidate_all_or_none(seed: int, extra: str) -> None:
    problem = replace(_problem(seed), together=torch.tensor([False, True, False, True]))
    price = torch.tensor([0.1, 0.2], dtype=torch.float64)
    if extra == "opening":
        problem = replace(problem, opening=price)
    if extra == "using":
        problem = replace(problem, using=price[:, None].expand(-1, 4) / 4)

    def is_whole(choice: torch.Tensor) -> bool:
        groups = [choice[problem.group == g] for g in (0, 1)]
        return all(len(c.unique()) == 1 or not bool((c % 2).any()) for c in groups)

    for budget in (2.0, 2.6, 3.5):
        fits = [
            problem.total_loss(choice)
            for choice in map(torch.tensor, itertools.product(range(4), repeat=5))
            if is_whole(choice) and problem.total_cost(choice) <= budget
        ]
        if not fits:
            with pytest.raises(Unreachable):
                allocate(problem, budget)
            continue
        choice = allocate(problem, budget)
        assert is_whole(choice)
        assert problem.total_cost(choice) <= budget + 1e-9
        worst_step = float(problem.loss.max(dim=1).values[:3].sum())  # a group moves as one
        assert problem.total_loss(choice) <= min(fits) + worst_step
    cheap = problem.cost.clone()
    cheap[:, 1] = 1e-3
    assert set(allocate(replace(problem, cost=cheap), 0.5).tolist()) == {1}


def test_more_budget_never_hurts_and_enough_of_it_buys_no_error() -> None:
    problem = _problem(3)
    losses = [problem.total_loss(allocate(problem, b)) for b in (2.5, 3.0, 4.0, 5.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_unreachable_budgets_say_what_is_reachable() -> None:
    problem = _problem(0)
    least = float(problem.cost.min(dim=1).values.sum())
    with pytest.raises(Unreachable, match="out of reach") as caught:
        allocate(problem, least * 0.9)
    assert caught.value.least == pytest.approx(least)


@pytest.mark.parametrize("distinct", [1, 2])
def test_a_layer_keeps_to_its_number_of_kernels(distinct: int) -> None:
    problem = _problem(1, distinct=distinct)
    choice = allocate(problem, 3.0)
    assert problem.total_cost(choice) <= 3.0 + 1e-9
    for group in (0, 1):
        assert len(choice[problem.group == group].unique()) <= distinct


def test_a_further_kernel_in_a_layer_must_pay_for_itself() -> None:
    problem = _problem(1)
    free = allocate(problem, 3.0)
    counts = [len(free[problem.group == g].unique()) for g in (0, 1)]
    assert max(counts) > 1
    dear = replace(problem, opening=torch.full((2,), 0.5, dtype=torch.float64))
    assert dear.total_cost(free) == pytest.approx(
        problem.total_cost(free) + 0.5 * (sum(counts) - 2)
    )
    choice = allocate(dear, 3.0)
    assert dear.total_cost(choice) <= 3.0 + 1e-9
    assert sum(len(choice[problem.group == g].unique()) for g in (0, 1)) < sum(counts)


def test_masks_fit_their_memory() -> None:
    problem = _problem(2)
    sizes = [0, 100, 200, 300]
    for limit in (600, 300, 100):
        used = within_memory(problem, 4.2, sizes, limit).unique().tolist()
        assert sum(sizes[c] for c in used) <= limit
    with pytest.raises(InputError):
        within_memory(problem, 2.0, sizes, 0)


def test_pinned_heads_stay_dense_and_excluded_methods_stay_out() -> None:
    candidates = candidates_for(GRID, ["gna", "radial"])
    probe = _probe(candidates, [None], 48)
    for step in (0, 3):
        probe.attend(_call(step=step), load("reference"))
    table = merge([probe.results()], candidates, probe.sites)
    limits = Constraints(dense_heads=((0, 1),), exclude=("gna",))
    weight = torch.ones(1, 2, 2, dtype=torch.float64)
    problem = problem_of(table, weight, table.density, limits)
    choice = allocate(problem, 0.8).view(1, 2, 2)
    assert not choice[:, :, 1].any()
    assert {candidates[c].method.name for c in choice.flatten().tolist()} == {"dense", "radial"}
    assert problem.total_cost(choice.flatten()) <= 0.8


def test_cost_tables_interpolate_and_survive_json() -> None:
    table = CostTable("measured", "cpu", "cpu", 100, 2, 16, 10.0, {32: ((0.1, 2.0), (0.5, 6.0))})
    assert table.ratio(0.3, 32) == pytest.approx(0.4)
    assert table.ratio(0.3, 64) == pytest.approx(0.4)  # the nearest block size that was timed
    assert table.ratio(0.9, 32) == pytest.approx(1.0)
    assert table.ratio(0.0, 32) == 0 < table.ratio(0.01, 32) < table.ratio(0.1, 32)
    assert CostTable.from_dict(table.to_dict()) == table
    assert CostTable("flops", "", "", 100, 2, 16, 1.0, {}).ratio(0.3, 32) == 0.3


def test_kernel_times_are_measured_for_every_block_size() -> None:
    where = torch.device("cpu")
    table = measure_costs(
        TokenGrid(4, 12, 12),
        2,
        32,
        backend="cpu",
        device=where,
        dtype=torch.float32,
        blocks=(32, 64),
    )
    assert table.basis == "measured"
    assert set(table.sparse_ms) == {32, 64}
    assert table.dense_ms > 0
    assert all(ms > 0 for p in table.sparse_ms.values() for _, ms in p)


@pytest.mark.parametrize("band", ["stripe", "frame", "row", "column", "first_frame"])
def test_a_head_is_named_after_the_band_that_holds_its_mass(band: str) -> None:
    from dittools.searching.atlas import BANDS

    grid = TokenGrid(6, 8, 8)
    rows = sample_rows(grid.total, 64, 0)
    keys = band_keys(grid, tuple(rows.tolist()))
    spread = keys[BANDS.index(band)].double()
    mass = spread / spread.sum(dim=1, keepdim=True)
    held = (mass * keys).sum(dim=2).mean(dim=1).tolist()
    uniform = band_shares(grid, rows).tolist()
    assert head_class(held, uniform) == {"first_frame": "sink"}.get(band, band)
    assert head_class(uniform, uniform) == "spread"


def test_bands_hold_the_keys_they_are_named_after() -> None:
    from dittools.searching.atlas import BANDS

    grid = TokenGrid(4, 5, 6, text_after=2)
    keys = band_keys(grid, (0, 47, 119))
    counts = {name: keys[n].sum(dim=1).tolist() for n, name in enumerate(BANDS)}
    assert counts["stripe"] == [4, 4, 4]
    assert counts["frame"] == [30, 30, 30]
    assert counts["row"] == [24, 24, 24]
    assert counts["column"] == [20, 20, 20]
    assert counts["text"] == [2, 2, 2]
    assert counts["local"][:2] == [2 * 2 * 2, 3 * 3 * 2]  # a corner; the right edge in the middle


def _seen_table(branches: tuple[str, ...] = ("cond", "uncond")) -> Table:
    candidates = candidates_for(GRID, ["gna", "radial"])
    probe = _probe(candidates, [None], 48)
    for step in (0, 3):
        for branch in branches:
            probe.attend(replace(_call(step=step), branch=branch), load("reference"))
    return merge([probe.results()], candidates, probe.sites)


def test_a_layer_copies_its_predecessor_where_that_costs_little() -> None:
    loss = torch.tensor([[9.0, 1.0, 1.02], [9.0, 1.02, 1.0], [9.0, 5.0, 1.0], [9.0, 1.0, 5.0]])
    problem = Problem(
        loss.double(),
        torch.tensor([[1.0, 0.3, 0.3]]).expand(4, 3).double(),
        torch.tensor([0, 1, 2, 3]),
        torch.ones(4, 3, dtype=torch.bool),
    )
    choice = torch.tensor([1, 2, 2, 1])
    assert reuse_neighbours(problem, choice, (4, 1, 1), 0.05, 9.0).tolist() == [1, 1, 2, 1]
    assert reuse_neighbours(problem, choice, (4, 1, 1), 0.0, 9.0).tolist() == [1, 2, 2, 1]
    problem.cost[1, 1] = 5.0  # copying would break the budget
    assert reuse_neighbours(problem, choice, (4, 1, 1), 0.05, 2.0).tolist() == [1, 2, 2, 1]


def test_branches_split_into_parts_of_their_own() -> None:
    table = _seen_table()
    split = table.split()
    assert split is not None
    assert split.shape == (1, 4, 2)  # two step ranges of two branches
    assert [split.part(n) for n in range(4)] == [
        (0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"),
    ]  # fmt: skip
    assert torch.allclose(split.error.view(1, 2, 2, 2, -1).mean(dim=2), table.error)
    assert split.range_weight().tolist() == [1, 1, 1, 1]
    assert _seen_table(("cond",)).split() is None
    choice = torch.tensor([[[1, 1], [1, 1], [1, 2], [2, 2]]]).flatten()
    facts = ModelFacts("X", 1, 2, 16)
    rules = plan_of(split, choice, facts).rules
    assert [(r.steps, r.heads, r.branch) for r in rules] == [
        ((0.0, 0.5), "all", "all"),
        ((0.5, 1.0), (0,), "cond"),
        ((0.5, 1.0), (1,), "cond"),
        ((0.5, 1.0), "all", "uncond"),
    ]


def test_survivors_are_those_some_head_would_choose() -> None:
    table = _seen_table()
    kept = survivors(table)
    assert 0 not in kept
    assert 0 < len(kept) < len(table.candidates) - 1
    assert len(survivors(table, most=2)) == 2
    solver = Solver(
        table,
        flat_weights(table),
        flops_table(GRID, 2, 16),
        Constraints(),
        ModelFacts("X", 1, 2, 16),
    )
    for budget in (0.2, 0.4, 0.6):
        assert set(solver.solve(budget).choice.tolist()) - {0} <= set(kept)


def test_what_lost_the_first_look_keeps_its_errors_but_is_not_used() -> None:
    whole = _seen_table()
    probe = Probe(whole.sites, whole.candidates, [None], active=[1, 2])
    for step in (0, 3):
        probe.attend(_call(step=step), load("reference"))
    table = merge([probe.results()], whole.candidates, whole.sites, whole, [1, 2])
    assert table.active.tolist() == [n < 3 for n in range(len(whole.candidates))]
    assert torch.equal(table.error[..., 3:], whole.error[..., 3:])
    weight = flat_weights(table)
    problem = problem_of(table, weight, table.density, Constraints())
    assert set(allocate(problem, 0.7).tolist()) <= {0, 1, 2}
