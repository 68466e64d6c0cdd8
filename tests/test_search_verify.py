"""The verification loop: plans are tightened or relaxed by what held-out generations really did."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import dittools
from dittools.errors import InputError
from dittools.patches.install import root_of
from dittools.pipelines import load
from dittools.pipelines.generate import Run, Settings, generate
from dittools.plans import ModelFacts, Plan
from dittools.searching import Budget, Constraints, measure, run
from dittools.searching.allocate import Unreachable
from dittools.searching.measure import Bench, Score
from dittools.searching.solver import Solution, Solver
from dittools.searching.store import Store
from dittools.searching.verify import PSNR_SLACK_DB, Goal, Trial, Verdict, Verifier

LEAST = 0.1  # the cheapest plan there is
FINE = 2000  # plans per unit of budget: closer budgets give the same plan


class ToySolver:
    """A plan for every budget from LEAST on; its loss stands for its PSNR, 60 dB per unit."""

    reachable = Solver.reachable

    def __init__(self, by_time: bool, fine: int) -> None:
        self.by_time, self.fine = by_time, fine

    def solve(self, budget: float) -> Solution:
        if budget < LEAST:
            error = Unreachable("too cheap")
            error.least = LEAST
            raise error
        choice = torch.tensor([int(budget * self.fine)])
        return Solution(Plan(), choice, budget, budget, budget, budget)


@dataclass
class ToyBench:
    """What generations do with the plan of a budget."""

    psnr_db: Callable[[float], float] = lambda budget: 60 * budget
    density: Callable[[float], float] = lambda budget: budget
    time: Callable[[float], float] | None = None  # of a generation, dense 1
    last: float = 0.0

    def score(self, _what: str, _plan: Plan, _settings: Any, is_timed: bool) -> Score:
        assert is_timed == (self.time is not None)
        times = () if self.time is None else (1 / self.time(self.last),)
        return Score((self.psnr_db(self.last),), (1.0,), (0.0,), self.density(self.last), times)


def verifier(bench: ToyBench, rounds: int = 8, fine: int = FINE) -> Verifier:
    class Noted(ToySolver):
        def solve(self, budget: float) -> Solution:
            solution = super().solve(budget)
            bench.last = budget
            return solution

    class Predicts:
        def psnr_db(self, loss: float) -> float:
            return 60 * loss

    args: Any = (bench, Noted(bench.time is not None, fine), Predicts(), [Settings("p")], rounds)
    return Verifier(*args)


# -- densities and speed-ups


@pytest.mark.parametrize(("kept", "plans"), [(1.0, 1), (0.97, 1), (1.3, 2), (0.7, 2)])
def test_a_density_is_tightened_and_relaxed_until_the_run_meets_it(kept: float, plans: int) -> None:
    verdict = verifier(ToyBench(density=lambda budget: kept * budget)).within(Goal.density(0.4))
    assert verdict.met
    assert len(verdict.trials) == plans
    assert 0.95 * 0.4 <= verdict.chosen.executed <= 0.402
    within = [t.score.mean_psnr_db for t in verdict.trials if t.executed <= 0.402]
    assert verdict.chosen.score.mean_psnr_db == max(within)


SHARE = 0.5  # of a dense generation that is attention


def by_speed(overhead: float, target: float, scale: float = 1.0) -> Verdict:
    """Return the verdict where attention takes `scale` times the prediction and an overhead."""
    bench = ToyBench(time=lambda budget: 1 - SHARE + SHARE * (overhead + scale * budget))
    start = 1 - (1 - 1 / target) / SHARE
    return verifier(bench).within(Goal.speedup(target, start, SHARE))


@pytest.mark.parametrize(("overhead", "scale"), [(0.0, 1.0), (0.15, 1.0), (0.0, 1.4), (0.1, 1.2)])
def test_a_speedup_is_met_by_the_clock_and_not_by_the_prediction(
    overhead: float, scale: float
) -> None:
    verdict = by_speed(overhead, 1.3, scale)
    assert verdict.met
    assert 1.3 * (1 - 1e-9) <= verdict.chosen.score.speedup < 1.3 * 1.04
    assert (len(verdict.trials) > 1) == (overhead > 0 or scale > 1)
    assert f"{verdict.chosen.score.speedup:.2f} times as fast" in verdict.remark


def test_time_left_over_is_spent_on_quality() -> None:
    verdict = by_speed(0.0, 1.3, scale=0.6)
    first = verdict.trials[0]
    assert first.score.speedup > 1.3 * 1.04
    assert verdict.met
    assert verdict.chosen.score.mean_psnr_db > first.score.mean_psnr_db + 5


def test_a_speedup_no_plan_reaches_ends_with_the_fastest_and_its_speed() -> None:
    verdict = by_speed(0.5, 1.3)
    assert not verdict.met
    fastest = 1 / (1 - SHARE + SHARE * (0.5 + LEAST))
    assert verdict.chosen.score.speedup == pytest.approx(fastest, abs=1e-3)
    assert f"{fastest:.2f} times as fast as dense is the closest" in verdict.remark
    assert len({t.budget for t in verdict.trials}) == len(verdict.trials)


# -- a PSNR


@pytest.mark.parametrize("target", [20.0, 28.0, 41.0])
@pytest.mark.parametrize("offset", [-4.0, 0.0, 5.0])
@pytest.mark.parametrize("slope", [40.0, 60.0, 100.0])
def test_a_psnr_is_met_within_half_a_db_in_few_plans(
    target: float, offset: float, slope: float
) -> None:
    middle = 0.4
    bench = ToyBench(lambda budget: 60 * middle + offset + slope * (budget - middle))
    verdict = verifier(bench).at_least(target)
    least = bench.psnr_db(LEAST)
    assert 0 <= verdict.chosen.score.mean_psnr_db - max(target, least) <= PSNR_SLACK_DB
    assert len(verdict.trials) <= 4


@pytest.mark.parametrize("fine", [150, FINE])
def test_scatter_between_near_plans_is_no_way_round_the_target(fine: int) -> None:
    """Every plan is better or worse than its budget says, by 0.6 dB (standard deviation)."""
    hits, plans = 0, 0
    for seed in range(60):
        random = Random(seed)
        scatter = [random.gauss(0, 0.6) for _ in range(fine + 1)]
        slope, offset = random.uniform(30, 80), random.uniform(-4, 4)

        def psnr_db(
            budget: float, scatter: Any = scatter, slope: Any = slope, offset: Any = offset
        ) -> float:
            return 24 + offset + slope * (budget - 0.4) + scatter[int(budget * fine)]

        trials = verifier(ToyBench(psnr_db), fine=fine).at_least(24.0).trials
        choices = [int(t.solution.choice) for t in trials]
        assert len(set(choices)) == len(choices), "no plan is tried twice"
        hits += any(0 <= t.score.mean_psnr_db - 24 <= PSNR_SLACK_DB for t in trials)
        plans += len(trials)
    assert hits >= 51 or fine < FINE, "few plans: there may be none within half a dB"
    assert plans <= 60 * 4.6


def test_a_plateau_just_below_the_target_is_climbed() -> None:
    def psnr_db(budget: float) -> float:
        return 23.8 + 60 * (min(budget - 0.35, 0.0) + max(budget - 0.45, 0.0))

    verdict = verifier(ToyBench(psnr_db)).at_least(24.0)
    assert verdict.chosen.budget < 0.5
    assert len(verdict.trials) <= 8


def test_nothing_dearer_than_a_good_plan_is_tried_and_rounds_are_kept() -> None:
    random = Random(3)
    scatter = [random.gauss(0, 1.0) for _ in range(FINE + 1)]
    for target in range(12, 50, 3):
        trials = (
            verifier(ToyBench(lambda budget: 60 * budget + scatter[int(budget * FINE)]), 6)
            .at_least(float(target))
            .trials
        )
        assert len(trials) <= 6 + 1
        for number, trial in enumerate(trials):
            good = [t.budget for t in trials[:number] if t.score.mean_psnr_db >= target]
            assert trial.budget < min(good, default=1.1)


def test_the_cheapest_plan_ends_it_and_what_is_out_of_reach_says_what_is_not() -> None:
    easy = verifier(ToyBench(lambda budget: 60 * budget + 30)).at_least(20.0)
    assert easy.chosen.budget == pytest.approx(LEAST, rel=1e-3)
    with pytest.raises(InputError, match=r"out of reach.*at most 35\.00 dB.*40 dB"):
        verifier(ToyBench(lambda budget: 35 * budget)).at_least(40.0)


# -- on a pipeline


PROMPTS = ["a red circle", "a blue square", "a cat", "a dog on a green square"]
SIZE: dict[str, Any] = {"steps": 2, "frames": 9, "height": 32, "width": 48}


def test_timed_scores_set_each_plan_against_dense_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, order = load("tiny/wan"), []

    def clocked(pipe: Any, settings: Settings) -> Run:
        is_dense = root_of(pipe.transformer) is None
        order.append((settings.prompt, is_dense))
        return replace(generate(pipe, settings), seconds=3.0 if is_dense else 2.0)

    monkeypatch.setattr(measure, "generate", clocked)
    bench, plan = Bench(pipe, Store(None), "cpu"), Plan.of(dittools.GNA(window=3))
    prompts = [Settings(p, **SIZE) for p in PROMPTS[:2]]
    timed = bench.score("verifying", plan, prompts, is_timed=True)
    assert order == [(s.prompt, dense) for s in prompts for dense in (True, False)]
    assert timed.speedups == (1.5, 1.5)
    assert timed.to_dict()["speedup"] == 1.5
    plain = bench.score("verifying", plan, prompts)
    assert replace(timed, speedups=()) == plain, "and are the same otherwise"
    assert "speedup" not in plain.to_dict()
    assert len(order) == 4 + 2, "its dense frames are kept"


@pytest.mark.parametrize("realised", [1.2, 1.01])
def test_a_search_for_a_speedup_says_what_generations_took(
    realised: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clocked(pipe: Any, settings: Settings) -> Run:
        is_dense = root_of(pipe.transformer) is None
        return replace(generate(pipe, settings), seconds=1.0 if is_dense else 1 / realised)

    def costs(_store: Any, facts: Any, *_: Any) -> Any:
        return replace(run.plain_costs(facts), attention_share=0.5)

    monkeypatch.setattr(measure, "generate", clocked)
    monkeypatch.setattr(run, "cost_table", costs)
    given: dict[str, Any] = {"methods": ["gna", "sparse_vdit"], **SIZE}
    found = dittools.search(
        load("tiny/wan"),
        PROMPTS,
        target_speedup=1.15,
        budget=Budget(1, 2, 18, 1, 2, 3, 1),
        out=tmp_path / "plan.json",
        **given,
    )
    assert found.met == (realised > 1.15)
    assert found.frontier["chosen"]["speedup"] == pytest.approx(realised, abs=1e-4)
    assert found.plan.measured["held_out"]["speedup_each"] == pytest.approx([realised] * 2)
    assert f"{realised:.2f} times as fast as dense" in found.remark
    assert len(found.frontier["trials"]) > 1, "relaxed, or tightened"
    scores = [s["held_out"] for s in found.frontier["singles"] if s["held_out"]]
    assert [s["speedup"] for s in scores] == pytest.approx([realised], abs=1e-4)
    compared = found.frontier["weights"]["calibration_psnr_db"]
    assert "0 of layers, 0 of steps" in compared, "flat weights"
    report = (tmp_path / "report.html").read_text()
    assert ">speed-up<" in report
    assert "speed-up of a whole generation" in report
    assert "plans compared on the calibration prompts" in report


@pytest.mark.parametrize("psnr_db", [34.0, 36.0])
def test_flatter_weights_are_tried_where_errors_are_large(
    psnr_db: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(_bench: Bench, what: str, plans: Any, settings: Any, is_timed: bool = False) -> Any:
        return [Score((psnr_db,), (1.0,), (1.0,), 0.5)] * len(plans)

    monkeypatch.setattr(Bench, "score_all", scored)
    given: dict[str, Any] = {"methods": ["gna", "sparse_vdit"], **SIZE}
    budget = Budget(1, 1, 18, 1, 2, 1, 0)
    found = dittools.search(
        load("tiny/wan"), PROMPTS, target_density=0.5, budget=budget, **given
    ).frontier
    tried = ["1 of layers, 1 of steps", "0.5 of layers, 0.5 of steps", "0 of layers, 0 of steps"]
    assert list(found["weights"]["calibration_psnr_db"]) == tried[: 3 if psnr_db < 35 else 1]


def test_a_plan_that_a_single_method_beats_is_not_delivered() -> None:
    def score(psnr_db: float, speedup: float) -> Score:
        return Score((psnr_db,), (1.0,), (1.0,), 0.5, (speedup,))

    class Singles(ToySolver):
        constraints, model = Constraints(), ModelFacts("X", 1, 2, 16)

        def single(self, number: int) -> Solution:
            return replace(self.solve(0.5), plan=Plan.of(dittools.METHODS["gna"]()))

    class Predicts:
        def psnr_db(self, loss: float) -> float:
            return 60 * loss

    solver: Any = Singles(True, FINE)
    predictor: Any = Predicts()
    trial = Trial(0.5, solver.solve(0.5), 30.0, score(20.0, 1.2))
    plan = Verdict(trial, [trial], True, "as it was")
    slow, worse, better = (1, score(40.0, 1.1)), (2, score(19.0, 1.3)), (3, score(25.0, 1.3))
    assert run.or_single(plan, [slow, worse], solver, predictor, 1.15) is plan
    found = run.or_single(plan, [slow, worse, better], solver, predictor, 1.15)
    assert found.chosen.score is better[1]
    assert found.chosen.solution.plan.model == solver.model
    assert found.trials == [trial, found.chosen]
    assert "1.30 times as fast as dense by one method alone" in found.remark
    missed = replace(plan, met=False)
    assert run.or_single(missed, [worse], solver, predictor, 1.15).met
    solver.constraints = Constraints(dense_layers=(0,))
    assert run.or_single(plan, [better], solver, predictor, 1.15) is plan
