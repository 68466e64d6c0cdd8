"""Scaling over GPUs: formulas against counted bytes and FLOPs, and the page against its numbers."""

import itertools
import json
import sys
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from toys import OLD

from dittools.metrics.work import WorkCounter
from dittools.plans import Plan
from dittools.plans.balance import assign, capacities, head_work, plan_balance, slowest

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs/results/scaling.json"
NAMES = ("configs", "scaling", "scaling_model", "scaling_page", "ulysses_ranks")


@pytest.fixture(scope="module")
def scripts() -> Iterator[ModuleType]:
    """bench/scaling.py and, as its attributes, what it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        import scaling

        yield scaling


@pytest.fixture(scope="module")
def model(scripts: ModuleType) -> Any:
    import scaling_model

    return scaling_model


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.skipif(OLD, reason="diffusers is too old")
def test_two_ranks_send_the_bytes_of_the_formula(scripts: ModuleType) -> None:
    chosen = [case for case in scripts.cases() if case.ranks == 2 and "8 heads" in case.name]
    rows = scripts.measure(chosen)
    assert len(rows) == 2 * len(chosen) == 4
    for row in rows:
        assert row["sparse"] == row["dense"] == row["formula"], row
        assert row["agrees"]
        assert row["sparse_calls"]
        assert row["error"] < 2e-6
        payload = sum(row["sparse"].values())
        assert payload < row["socket"] < 1.1 * payload


def test_one_byte_more_is_a_disagreement(scripts: ModuleType) -> None:
    case = next(case for case in scripts.cases() if case.name == "toy Flux, 8 heads")
    formula = case.formula(1)
    report = {"calls": {"sparse": 4}, "density": 0.4}
    one = {"sent": dict(formula), "stock_sent": formula, "socket": 0, "report": report, "error": 0}
    assert scripts._row(case, 1, one)["agrees"]
    one["sent"] = {**formula, "all_to_all": formula["all_to_all"] + 1}
    assert not scripts._row(case, 1, one)["agrees"]


def test_flops_are_those_the_operators_of_the_denoiser_do(scripts: ModuleType, model: Any) -> None:
    import diffusers

    case = next(case for case in scripts.configs.RELEASED if case.name == "wan-14b-720p")
    config = {**case.config, "num_layers": 2}
    frames, height, width = case.latent
    with torch.device("meta"):
        denoiser = diffusers.WanTransformer3DModel(**config)
        inputs = {
            "hidden_states": torch.empty(1, 16, frames, height, width),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
        }
    with WorkCounter(lambda: "transformer") as counter, torch.no_grad():
        denoiser(**inputs)
    c = model.Denoiser(case.tokens, 40, 128, 2, 13824)
    assert counter.work.flops() == c.attention_flops + c.split_flops + c.repeated_flops
    assert c.attention_flops == 2 * 4 * 75_600**2 * 5120


def test_all_ranks_together_do_the_work_of_one(scripts: ModuleType, model: Any) -> None:
    wan, hardware, net = scripts.wan_14b(), model.Hardware(), model.NETWORKS[0]
    alone = model.estimate(wan, 1, 0.3, hardware, net)
    assert alone.bytes == alone.communication_ms == 0
    for ranks in (2, 8, 40):
        one = model.estimate(wan, ranks, 0.3, hardware, net)
        repeated = (ranks - 1) * wan.repeated_flops
        assert one.flops * ranks == pytest.approx(alone.flops + repeated)
        n, c = wan.tokens, wan.channels
        assert one.layer_bytes == pytest.approx(4 * n * c * 2 * (ranks - 1) / ranks**2)
    assert model.estimate(wan, 8, 1.0, hardware, net).bytes == one_forward(wan, 8)


def one_forward(wan: Any, ranks: int) -> float:
    layer = 4 * wan.tokens * wan.channels * 2 * (ranks - 1) / ranks**2
    return float(40 * layer + wan.tokens * 64 * 2 * (ranks - 1) / ranks)


def test_which_numbers_of_ranks_run_is_what_diffusers_pads(model: Any) -> None:
    assert model.mode_of(40, 1) == "one GPU"
    for heads, ranks in itertools.product((3, 24, 30, 40), range(2, 65)):
        missing, each = -heads % ranks, -(-heads // ranks)
        expected = "ulysses" if not missing else "ulysses_anything"
        if missing >= each:  # the last rank alone is padded
            expected = "refused"
        assert model.mode_of(heads, ranks) == expected
    assert [model.fitting(40, n) for n in (10, 16, 32, 64)] == [10, 8, 8, 8]


def test_the_network_takes_over_where_exchanging_takes_longer(
    scripts: ModuleType, model: Any
) -> None:
    wan, hardware = scripts.wan_14b(), model.Hardware(500, 600, 0)
    net = model.Network("flat", 64, 40.0, 40.0)

    def attention(one: Any) -> float:
        return float(one.attention_ms)

    critical = model.critical_density(wan, 8, hardware, net, False)
    # 4 N C e (R - 1) / R^2 / B = 4 d N^2 C / R / F
    assert critical == pytest.approx(2 * 500e12 / (75_600 * 40e9) * 7 / 8, rel=0.01)
    assert model.crossing(wan, critical * 1.001, hardware, net, 8, attention) is None
    assert model.crossing(wan, critical * 0.999, hardware, net, 8, attention) == 8


def test_links_out_of_a_node_carry_what_leaves_it(model: Any) -> None:
    hardware = model.Hardware(500, 600, 0)
    slow = model.Network("nodes", 8, 1e9, 1.0)
    ms = model._milliseconds(15e6, 1, 16, hardware, slow)  # 8 of 15 parts leave the node
    assert ms == pytest.approx(8)
    assert model._milliseconds(7e6, 1, 8, hardware, slow) < 1e-3
    assert model._milliseconds(9e6, 1, 10, hardware, slow) == pytest.approx(5)  # five and five


def test_forty_heads_are_even_where_the_page_says_so(
    scripts: ModuleType, found: dict[str, Any]
) -> None:
    assert json.loads(json.dumps(scripts.balances())) == found["balance"]
    for row in found["balance"]["drawn"]:
        assert row["least"] - 1e-9 <= row["slowest"] <= row["in_order"]
        assert (row["slowest"] <= 1.10) == (row["ranks"] <= 8 or row["slowest"] < 1.06), row


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("path", ["docs/plans/demo-0.4.json", "docs/plans/demo-0.4-fast.json"])
def test_no_split_of_the_committed_plans_is_evener(
    scripts: ModuleType, path: str, ranks: int
) -> None:
    plan, room = Plan.load(ROOT / path), list(capacities(3, ranks))
    known = plan.measured["densities"]
    every = [
        owners
        for owners in itertools.product(range(ranks), repeat=3)
        if [owners.count(rank) for rank in range(ranks)] == room
    ]
    total = top = 0.0
    branches = ("cond", "uncond") if plan.needs_branch else ("",)
    for layer, branch in itertools.product(range(6), branches):
        rules = [plan.rules_for(layer, "", step, 12, 3, branch) for step in range(12)]
        works = Counter(head_work(rule, scripts.DEMO_GRID, 3, known) for rule in rules)
        phases = tuple((float(count), work) for work, count in works.items())
        best = min(slowest(phases, owners, ranks) for owners in every)
        assert slowest(phases, assign(phases, ranks), ranks) <= best + 0.01
        load = sum(count * sum(work) for count, work in phases)
        total, top = total + load, top + best * load
    whole = plan_balance(plan, scripts.DEMO_GRID, layers=6, heads=3, steps=12, ranks=ranks)
    assert top / total - 1e-9 <= whole.slowest <= top / total + 0.01
    assert "too few heads on a rank" in str(whole)


def test_no_dealing_goes_below_the_bound(model: Any) -> None:
    assert model.least_slowest((1.0, 1.0, 1.0, 0.0), 2) == pytest.approx(4 / 3)
    assert model.least_slowest((0.5,) * 8, 4) == 1.0
    work = (1.0, 0.1, 0.3, 0.3, 0.2, 0.1)
    best = min(
        slowest([(1.0, work)], owners, 3)
        for owners in itertools.product(range(3), repeat=6)
        if all(owners.count(rank) == 2 for rank in range(3))
    )
    assert model.least_slowest(work, 3) == pytest.approx(best)


def test_page_and_numbers_are_current(scripts: ModuleType, model: Any, found: Any) -> None:
    """`make scaling` writes both anew."""
    import scaling_page

    assert (ROOT / "docs/scaling.md").read_text(encoding="utf-8") == scaling_page.page(found)
    densities = tuple(dict.fromkeys(row["density"] for row in found["simulated"]["rows"]))
    again = scripts.simulate(
        scripts.wan_14b(), model.Hardware(), model.NETWORKS, scripts.RANKS, densities
    )
    assert json.loads(json.dumps(again)) == found["simulated"]
    assert (
        json.loads(json.dumps(scripts.simulate_halo(scripts.RANKS))) == found["halo"]["simulated"]
    )
    assert [row["ranks"] for row in found["halo"]["measured"]] == [2, 2, 4, 4, 4, 4]
    assert all(row["agrees"] for row in found["halo"]["measured"])
    assert [row["name"] for row in found["measured"]] == [
        case.name for case in scripts.cases() for _ in range(case.ranks)
    ]
    assert all(row["agrees"] for row in found["measured"])


def test_a_network_is_read_from_words(scripts: ModuleType, model: Any) -> None:
    made = scripts.network("ours: a:8:400:25")
    assert made == model.Network("ours: a", 8, 400.0, 25.0)
    for wrong in ("ours", "a:b:1:1", "a:0:1:1", "a:8:0:1"):
        with pytest.raises(ArgumentTypeError):
            scripts.network(wrong)
