"""What choosing costs: groups of heads timed, followed through a run, and weighed in a search."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend, load
from dittools.methods import build
from dittools.patches import attach
from dittools.pipelines.generate import Settings, generate
from dittools.plans import ModelFacts, Plan, Rule
from dittools.searching.allocate import Problem, allocate
from dittools.searching.candidates import candidates_for, phrase
from dittools.searching.cost import CostTable, flops_table, measure_costs
from dittools.searching.forecast import forecast, predict
from dittools.searching.groups import (
    STATES,
    GroupCost,
    Watched,
    ends_of,
    kin,
    sizes_to_time,
    time_group,
    typical_call,
)
from dittools.searching.pricing import Load, Seen, state_shares
from dittools.searching.probe import Probe, Sites
from dittools.searching.request import Constraints
from dittools.searching.solver import Solver
from dittools.searching.table import flat_weights, merge

GRID = TokenGrid(8, 12, 12)
LOAD = Load(GRID, 2, 4, 64, 10, attention_share=0.5, seconds=10.0)
PSA = build("psa", {"block_size": 32})
MANY_CLUSTERS = {"mass": 0.3, "least_queries": 8, "least_keys": 4, "block_size": 8, "key_block": 8}
POINTS = ((0.25, 25.0), (0.75, 75.0))  # the kernel takes as long as the blocks it visits


def _cost(method: Any, heads: int, kernel: float, computed: float, **choosing: float) -> GroupCost:
    times = {state: choosing.get(state, 0.0) for state in STATES}
    every = dict.fromkeys(STATES, kernel)
    shares = dict.fromkeys(STATES, computed)
    return GroupCost(phrase(method), kin(method), heads, times, every, shares)


def _table(*groups: GroupCost, **extra: float) -> CostTable:
    args: Any = ("measured", "cpu", "cpu", GRID.total, 4, 64, 100.0, {32: POINTS})
    return CostTable(*args, groups=groups, **extra)


def _seen(plan: Plan, share: tuple[float, float], heads: tuple[int, ...] = (0, 1, 2, 3)) -> Seen:
    seen = Seen(1)
    for layer in range(LOAD.layers):
        for rule in plan.rules:
            seen.note((0, layer, heads, phrase(rule.method)), share)
    return seen


def test_choosing_counts_by_the_state_of_the_run() -> None:
    plan = Plan.of(PSA)
    times = {"first": 50.0, "later": 10.0, "turn": 20.0, "late": 0.0}
    found = predict(
        LOAD, plan, _table(_cost(PSA, 4, 30.0, 0.3, **times)), seen=_seen(plan, (0.3, 0.3))
    )
    # steps 0; 1 to 4; 5, with which the second half begins; 6 to 9
    spent = (50 + 4 * 10 + 20 + 10 * 30) / 1000
    assert 1 / found.attention_speedup == pytest.approx(spent)
    assert found.speedup == pytest.approx(1 / (0.5 + 0.5 * spent))


def test_a_group_that_changes_its_heads_begins_anew() -> None:
    cost = [_cost(PSA, heads, 0.0, 0.3, first=100.0) for heads in (1, 2)]
    steady = Plan((Rule(PSA, heads=(0, 1)),))
    twice = Plan(
        (Rule(PSA, heads=(0, 1), steps=(0.0, 0.5)), Rule(PSA, heads=(2, 3), steps=(0.5, 1.0)))
    )
    seen = _seen(steady, (0.3, 0.3), (0, 1))
    for layer in (0, 1):
        seen.note((0, layer, (2, 3), phrase(PSA)), (0.3, 0.3))
    one, two = (predict(LOAD, plan, _table(*cost), seen=seen) for plan in (steady, twice))
    dense = 0.5  # of the heads
    assert 1 / one.attention_speedup == pytest.approx(dense + 100 / 1000)
    assert 1 / two.attention_speedup == pytest.approx(dense + 200 / 1000)


def test_times_follow_the_number_of_heads_between_those_timed() -> None:
    table = _table(_cost(PSA, 1, 10.0, 0.3, later=2.0), _cost(PSA, 4, 25.0, 0.3, later=8.0))
    assert table.group(PSA, 2, {"later": 1.0}) == pytest.approx((0.04, 0.15))
    assert table.group(PSA, 4, {"later": 1.0}) == pytest.approx((0.08, 0.25))
    assert table.group(PSA, 4, {"later": 0.5, "late": 0.5}) == pytest.approx((0.04, 0.25))
    alone = _table(_cost(PSA, 2, 10.0, 0.3, later=2.0))
    assert alone.group(PSA, 4, {"later": 1.0}) == pytest.approx((0.04, 0.2))


def test_kernel_times_are_carried_to_the_share_of_blocks_that_is_visited() -> None:
    table = _table(_cost(PSA, 4, 30.0, 0.3))
    found = table.group(PSA, 4, {"later": 1.0}, 0.6)
    assert found is not None
    assert found[1] == pytest.approx(0.6)


def test_methods_not_timed_go_by_kin_and_else_are_named() -> None:
    sparse, dense, asked = (
        build("paro", {"density": d, "block_size": 32}) for d in (0.1, 0.6, 0.5)
    )
    table = _table(_cost(sparse, 4, 10.0, 0.1, late=1.0), _cost(dense, 4, 60.0, 0.6, late=6.0))
    assert table.group(asked, 4, {"late": 1.0}, 0.5) == pytest.approx((0.06, 0.5))
    other = build("paro", {"density": 0.5, "block_size": 32, "rows": 8})
    assert table.group(other, 4, {"late": 1.0}, 0.5) is None
    found = predict(LOAD, Plan.of(other), table)
    assert any("what paro takes to choose was not timed" in text for text in found.unknown)


def test_flops_say_that_choosing_is_left_out() -> None:
    found = predict(LOAD, Plan.of(build("paro")), flops_table(GRID, 4, 64))
    assert any("choosing is taken to cost nothing" in text for text in found.unknown)


def test_times_of_another_size_are_named() -> None:
    larger = replace(LOAD, grid=TokenGrid(9, 12, 12))
    found = predict(larger, Plan.of(build("gna")), _table())
    assert any("those of 1152 tokens, not 1296" in text for text in found.unknown)


def test_choosing_alone_can_make_a_layer_lose() -> None:
    plan = Plan((Rule(PSA, layers=(1,)),))
    seen = _seen(plan, (0.3, 0.3))
    cheap = predict(
        LOAD,
        plan,
        _table(_cost(PSA, 4, 30.0, 0.3, first=60.0, later=60.0, turn=60.0, late=60.0)),
        seen=seen,
    )
    dear = predict(
        LOAD,
        plan,
        _table(_cost(PSA, 4, 30.0, 0.3, first=80.0, later=80.0, turn=80.0, late=80.0)),
        seen=seen,
    )
    assert cheap.losing == ()
    assert dear.losing == (1,)
    assert not dear.plan.rules
    assert dear.speedup == 1 > dear.speedup_as_given
    # a backend that goes dense by itself saves the kernel, not the choosing
    slow = _table(_cost(PSA, 4, 500.0, 0.3, first=20.0, later=20.0, turn=20.0, late=20.0))
    declined = predict(LOAD, plan, slow, seen=seen, may_decline=True)
    assert 1 / declined.layers[1].attention_speedup == pytest.approx(1.2)


def test_looking_for_nan_counts_in_sparse_calls_alone() -> None:
    gna = build("gna", {"window": ("full", 0.5, 0.5), "stride": 1, "block_size": 32})
    plain, checked = (predict(LOAD, Plan.of(gna), _table(check_ms=ms)) for ms in (0.0, 7.0))
    assert 1 / checked.attention_speedup - 1 / plain.attention_speedup == pytest.approx(0.07)
    assert predict(LOAD, Plan(), _table(check_ms=7.0)).speedup == 1


def test_states_of_a_run_of_steps() -> None:
    assert state_shares(range(10), 10) == pytest.approx(
        {"first": 0.1, "later": 0.4, "turn": 0.1, "late": 0.4}
    )
    assert state_shares([8, 9], 10) == pytest.approx({"first": 0.5, "late": 0.5})
    assert state_shares([2], 10) == {"first": 1.0}


class _Counting:
    """A method that asks for a third of its first call's work later on, and notes its steps."""

    name: ClassVar[str] = "counting"
    seen: ClassVar[list[tuple[int, int, bool]]] = []

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        first = not call.memory
        call.memory["begun"] = True
        self.seen.append((call.step, call.steps, first))
        for _ in range(3 if first else 1):
            out = backend.dense(call)
        return out


def test_a_group_is_timed_in_every_state_with_one_memory() -> None:
    call = typical_call(TokenGrid(2, 4, 4), 2, 16, torch.float32, torch.device("cpu"))
    choosing, kernel, computed = time_group(_Counting(), call, load("reference"))
    assert _Counting.seen == [(0, 10, True), (1, 10, False), (8, 10, False), (9, 10, False)]
    assert computed == {"first": 3.0, "later": 1.0, "turn": 1.0, "late": 1.0}
    assert call.memory == {}
    assert all(ms >= 0 for ms in choosing.values())
    assert all(ms > 0 for ms in kernel.values())


def test_watching_changes_no_result_and_counts_extra_keys() -> None:
    call = typical_call(TokenGrid(4, 8, 8), 2, 16, torch.float32, torch.device("cpu"))
    watched = Watched(load("reference"), call.query.device)
    out = PSA.attend(call, watched)
    assert torch.equal(out, PSA.attend(call, load("reference")))
    assert 0 < watched.kept <= watched.asked
    assert watched.ms > 0


def test_typical_tensors_hold_their_mass_in_few_blocks() -> None:
    grid = TokenGrid(8, 8, 8, text_after=8)
    call = typical_call(grid, 2, 32, torch.float32, torch.device("cpu"))
    assert call.query.shape == (1, 520, 2, 32)
    importance = torch.softmax(
        torch.einsum("bqhd,bkhd->bhqk", call.query, call.key) * call.softmax_scale, -1
    )
    held = importance.sort(-1, descending=True).values.cumsum(-1)[..., 128].mean()
    assert held > 0.7  # a quarter of the keys; of plain noise it would be half of that
    mask_share = Watched(load("reference"), call.query.device)
    build(
        "svg2", {"least_queries": 16, "least_keys": 16, "block_size": 16, "key_block": 16}
    ).attend(call, mask_share)
    assert mask_share.kept < 0.9 * 520 * 520 * 2


def test_only_few_group_sizes_and_members_of_a_family_are_timed() -> None:
    groups = [(PSA, heads) for heads in (1, 2, 3, 5, 9)]
    assert [heads for _, heads in sizes_to_time(groups)] == [1, 3, 9]
    ladder = [build("paro", {"density": d}) for d in (0.1, 0.3, 0.6)]
    found = ends_of([*ladder, build("paro", {"rows": 8})], 4)
    assert [(getattr(m, "density", 0), heads) for m, heads in found] == [
        (0.1, 1), (0.1, 4), (0.6, 1), (0.6, 4), (0.3, 1), (0.3, 4),
    ]  # fmt: skip


def test_measured_tables_hold_groups_and_survive_json() -> None:
    grid = TokenGrid(4, 8, 8)
    table = measure_costs(
        grid,
        2,
        16,
        backend="reference",
        device=torch.device("cpu"),
        dtype=torch.float32,
        blocks=(32,),
        groups=[(PSA, 1), (PSA, 2), (build("paro", {"block_size": 32}), 2)],
    )
    assert [(c.method.split("(")[0], c.heads) for c in table.groups] == [
        ("psa", 1), ("psa", 2), ("paro", 2),
    ]  # fmt: skip
    assert all(c.choosing_ms["first"] > 0 for c in table.groups)
    paro = table.groups[2].choosing_ms
    assert paro["late"] < paro["first"]  # one mask serves the second half
    assert table.dtype == "float32"
    assert CostTable.from_dict(table.to_dict()) == table


def test_what_a_backend_cannot_run_is_left_out_of_the_table() -> None:
    quantised = build("paro", {"block_size": 32, "quantize": "int8"})
    table = measure_costs(
        TokenGrid(2, 8, 8),
        2,
        16,
        backend="cpu",
        device=torch.device("cpu"),
        dtype=torch.float32,
        blocks=(32,),
        groups=[(quantised, 2), (PSA, 2)],
    )
    assert [c.method.split("(")[0] for c in table.groups] == ["psa"]


def test_a_short_run_tells_the_density_of_methods_that_choose() -> None:
    from dittools.pipelines import load as load_pipe

    pipe = load_pipe("tiny/wan")
    sizes: dict[str, Any] = {"steps": 4, "frames": 17, "height": 64, "width": 64}
    plan = Plan((Rule(build("svg2", MANY_CLUSTERS), layers=(1,)),))
    found = forecast(pipe, plan, backend="cpu", **sizes)
    assert found.unknown == ()
    with attach(pipe, plan, backend="cpu") as handle:
        generate(pipe, Settings("a red circle", **sizes))
        measured = handle.report().to_dict()["density"]
    given = (found.layers[0].density + found.layers[1].density) / 2
    assert given == pytest.approx(measured, abs=0.02)
    assert found.layers[0].density == 1 > found.layers[1].density


def test_using_a_candidate_at_all_must_pay_for_itself() -> None:
    loss = torch.tensor([[0.0, 1.0, 1.1]] * 4, dtype=torch.float64)
    cost = torch.tensor([[1.0, 0.2, 0.3]] * 4, dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    using = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    problem = Problem(loss, cost, group, torch.ones_like(loss, dtype=torch.bool), using=using)
    choice = allocate(problem, 1.0)
    assert choice.tolist() == [2, 2, 1, 1]
    assert problem.total_cost(choice) == pytest.approx(1.0)
    assert problem.total_cost(torch.tensor([1, 2, 0, 0])) == pytest.approx(0.5 + 1.0 + 2.0)


def test_a_search_for_speed_weighs_choosing_as_the_forecast_does() -> None:
    grid = TokenGrid(5, 6, 7)
    candidates = candidates_for(grid, ["psa"])[:4]
    sites = Sites(grid, 1, 2, (0.0, 0.5, 1.0), 4, frozenset({0, 3}), torch.arange(0, 210, 5))
    probe = Probe(sites, candidates, [None])
    for step in (0, 3):
        generator = torch.Generator().manual_seed(step)
        q, k, v = torch.randn(3, 1, grid.total, 2, 16, generator=generator).unbind()
        call = AttentionCall(3 * q, k, v, grid, step=step, steps=4, branch="cond")
        probe.attend(call, load("reference"))
    table = merge([probe.results()], candidates, sites)
    facts = ModelFacts("X", 1, 2, 16)

    def solver(choosing: float) -> Solver:
        groups = tuple(
            _cost(c.method, heads, 20.0 * heads, 0.4, **dict.fromkeys(STATES, choosing + heads))
            for c in candidates[1:]
            for heads in (1, 2)
        )
        costs = replace(_table(*groups), heads=2, tokens=grid.total)
        return Solver(table, flat_weights(table), costs, Constraints(), facts, by_time=True)

    known = Load(grid, 1, 2, 16, 4, 0.5, 1.0)
    for choosing in (0.0, 5.0):
        single = solver(choosing).single(1)
        seen = Seen(2)
        for part in (0, 1):
            shares = [table.computed[0, part, head, 1].item() for head in (0, 1)]
            seen.note((part, 0, (0, 1), phrase(candidates[1].method)), (0.4, sum(shares) / 2))
        costs = solver(choosing).costs
        promised = predict(known, single.plan, costs, seen=seen)
        assert single.cost == pytest.approx(1 / promised.layers[0].attention_speedup, rel=0.02)
    assert solver(0.0).solve(0.75).choice.any()
    assert not solver(500.0).solve(1.0).choice.any()  # every method loses: all stay dense


def test_the_studio_promises_what_its_run_will_do() -> None:
    from dittools.studio.result import forecast_card

    plan = Plan((Rule(PSA, layers=(1,)),))
    dear = dict.fromkeys(STATES, 230.0)
    cost = _table(_cost(PSA, 4, 30.0, 0.3, **dear))
    found = predict(LOAD, plan, cost, seen=_seen(plan, (0.3, 0.3)))
    assert (round(found.speedup, 2), round(found.speedup_as_given, 2)) == (1.0, 0.71)
    text = forecast_card(found.to_dict())
    assert "0.71x" in text  # layers stay in the run that the plan names
    assert "10.0 s dense, 14.0 s accelerated" in text
    assert "slower than dense in layers 1" in text
    assert "it would be 1.00x" in text
    assert ">0.65<" in text
