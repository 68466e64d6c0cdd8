"""The verification loop: generate held-out prompts with the plan, then tighten or relax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from dittools.errors import InputError
from dittools.pipelines.generate import Settings
from dittools.searching.allocate import Unreachable
from dittools.searching.measure import Bench, Score
from dittools.searching.solver import Predictor, Solution, Solver

PSNR_SLACK_DB = 0.5  # how much better than asked for is close enough
_DENSITY_SLACK = 0.002  # a realised share of pairs this far above the target still meets it
_DENSITY_ROOM = 0.05  # of the target left unused, from which on the plan is relaxed
_TIME_ROOM = 0.03  # of the time the target allows, likewise
_AIM_DB = 0.25  # above the target, so that the next plan lands inside the slack
_HOPE_DB = 1.0  # how far below the target a plan may be expected and still be worth a try
_HASTE_DB = 0.15  # by which the aim moves when trials keep to one side of the target
_STEP = 0.0025  # share by which the budget moves on from one whose plan was tried
_PRIOR = 2.0  # dB^2: scatter of PSNR between near plans over that of slopes around 1
_GRID = (*(i / 50 for i in range(1, 50)), 0.99, 0.995, 1.0)


@dataclass(frozen=True)
class Trial:
    """One verified plan: what was asked of the solver, its answer, and how that did."""

    budget: float
    solution: Solution
    predicted_db: float
    score: Score

    @property
    def executed(self) -> float:
        """Share of pairs worked through: what was kept, times what the table says is worked on."""
        return self.score.density * self.solution.executed / max(self.solution.density, 1e-12)


@dataclass(frozen=True)
class Goal:
    """A budget that a plan must keep to when it runs.

    Attributes:
        budget: what the solver is asked for first.
        realised: what a trial took of it, in the same unit.
        slack: how much more still meets the goal.
        room: how much less makes it worth while to relax.
        words: what a trial reached, for a reader.
    """

    budget: float
    realised: Callable[[Trial], float]
    slack: float
    room: float
    words: Callable[[Trial], str]

    @staticmethod
    def density(target: float) -> "Goal":
        """Return the goal that so many of the pairs are worked through."""
        return Goal(
            target,
            lambda trial: trial.executed,
            _DENSITY_SLACK,
            _DENSITY_ROOM * target,
            lambda trial: f"{trial.executed:.3f} of the pairs",
        )

    @staticmethod
    def speedup(target: float, budget: float, share: float) -> "Goal":
        """Return the goal that a generation is so many times as fast as dense.

        Its unit is the time of attention, dense 1, and everything else is taken to stay.

        Args:
            target: the speed-up.
            budget: attention time predicted to reach it.
            share: of a dense generation that is attention.
        """
        return Goal(
            budget,
            lambda trial: 1 - (1 - 1 / trial.score.speedup) / share,
            1e-9,
            _TIME_ROOM / target / share,
            lambda trial: f"{trial.score.speedup:.2f} times as fast as dense",
        )

    def is_met(self, trial: Trial) -> bool:
        """Whether a trial kept to the budget."""
        return self.realised(trial) <= self.budget + self.slack

    def has_room(self, trial: Trial) -> bool:
        """Whether a trial left much of the budget unused."""
        return trial.budget < 1 and self.budget - self.realised(trial) > self.room


@dataclass
class Verdict:
    """The outcome of a verification.

    Attributes:
        chosen: the trial whose plan is delivered.
        trials: all of them, in order.
        met: whether the target was met.
        remark: one sentence for the report.
    """

    chosen: Trial
    trials: list[Trial] = field(default_factory=list)
    met: bool = True
    remark: str = ""


class Verifier:
    """Verifies plans on held-out generations."""

    def __init__(
        self,
        bench: Bench,
        solver: Solver,
        predictor: Predictor,
        settings: Sequence[Settings],
        rounds: int,
        notice: Callable[[Trial], None] = lambda _: None,
    ) -> None:
        """Keep what every trial needs; `notice` is called after each."""
        self.bench, self.solver, self.predictor = bench, solver, predictor
        self.settings, self.rounds, self.notice = settings, rounds, notice
        self.trials: list[Trial] = []

    def attempt(self, budget: float) -> Trial:
        """Return the trial of one budget; where that counts time, the generations are timed."""
        solution = self.solver.solve(budget)
        score = self.bench.score("verifying", solution.plan, self.settings, self.solver.by_time)
        trial = Trial(budget, solution, self.predictor.psnr_db(solution.loss), score)
        self.trials.append(trial)
        self.notice(trial)
        return trial

    def within(self, goal: Goal) -> Verdict:
        """Tighten the budget until what was realised is within the goal, relax it where it is not
        used up; of the plans that are within, the one with the best PSNR is delivered.

        Methods that look at query and key keep another share than they did in calibration, and a
        whole generation takes other times than its parts.
        """
        budget: float | None = goal.budget
        while budget is not None and len(self.trials) < self.rounds:
            trial = self.attempt(budget)
            if goal.is_met(trial) and not (goal.has_room(trial) and self._all_met(goal)):
                break
            budget = self._scaled(goal, trial)
        good = [t for t in self.trials if goal.is_met(t)]
        count = len(self.trials)
        if good:
            best = max(good, key=lambda t: t.score.mean_psnr_db)
            return Verdict(best, self.trials, True, f"{goal.words(best)} after {count} plan(s)")
        best = min(self.trials, key=goal.realised)
        remark = f"{goal.words(best)} is the closest of {count} plan(s)"
        return Verdict(best, self.trials, False, remark)

    def _all_met(self, goal: Goal) -> bool:
        return all(goal.is_met(t) for t in self.trials)

    def _scaled(self, goal: Goal, trial: Trial) -> float | None:
        """Return the next budget, in proportion to what the last trial took; None when tried."""
        found = max(goal.realised(trial), 1e-6)
        ratio = min(max(goal.budget / found, 0.5), 2.0)
        budget = self._solvable(min(trial.budget * ratio * (1.0 if ratio > 1 else 0.995), 1.0))
        return None if any(abs(budget - t.budget) < 1e-3 for t in self.trials) else budget

    def _solvable(self, budget: float) -> float:
        """Return the budget, or just above the least there is a plan for."""
        least = self.solver.reachable(budget)
        return least * 1.0001 if least > budget else budget

    def at_least(self, target_db: float) -> Verdict:
        """Find the cheapest plan whose held-out PSNR is at least the target, within half a dB.

        Raises:
            InputError: no plan within the constraints gets there; says which PSNR is reachable.
        """
        budget: float | None = self._guess(target_db + _AIM_DB)
        while budget is not None and len(self.trials) < self.rounds:
            trial = self.attempt(budget)
            if 0 <= trial.score.mean_psnr_db - target_db <= PSNR_SLACK_DB:
                break
            budget = self._next(target_db)
        good = self._good(target_db) or [
            t for t in [self.attempt(1.0)] if t.score.mean_psnr_db >= target_db
        ]
        if not good:
            best = max(t.score.mean_psnr_db for t in self.trials)
            raise InputError(
                "the PSNR asked for is out of reach",
                expected=f"at most {best:.2f} dB with these methods and constraints",
                got=f"{target_db:g} dB",
            )
        chosen = min(good, key=lambda t: (t.solution.density, t.budget))
        above = chosen.score.mean_psnr_db - target_db
        remark = f"{above:.2f} dB above the target after {len(self.trials)} plan(s)"
        return Verdict(chosen, self.trials, True, remark)

    def _good(self, target_db: float) -> list[Trial]:
        return [t for t in self.trials if t.score.mean_psnr_db >= target_db]

    @cached_property
    def _curve(self) -> list[tuple[float, float]]:
        """Budgets and the PSNR predicted for them, both rising."""
        found = []
        for budget in _GRID:
            try:
                loss = self.solver.solve(budget).loss
            except Unreachable:
                continue
            found.append((budget, self.predictor.psnr_db(loss)))
        return found

    def _guess(self, wanted_db: float) -> float:
        """Return the least budget whose predicted PSNR is enough."""
        for place, (budget, reached) in enumerate(self._curve):
            if reached >= wanted_db:
                below, less = self._curve[place - 1] if place else (budget, reached)
                share = (wanted_db - less) / (reached - less) if reached > less else 1.0
                return below + min(max(share, 0.0), 1.0) * (budget - below)
        return 1.0

    def _next(self, target_db: float) -> float | None:
        """Return the next budget: where a line through the trials says the target is met.

        PSNR does not rise smoothly with the budget, so close neighbours of plans that missed are
        tried too; never one that costs more than a plan that is good enough. None when nothing is
        left to try.
        """
        good = [t.budget for t in self._good(target_db)]
        most = max(t.budget for t in self.trials)
        if not good and most >= 1:
            return None
        wanted, slope = self._line(self._aim(target_db))
        budget = self._guess(wanted)
        budget = min(budget, min(good) * (1 - _STEP)) if good else max(budget, most * (1 + _STEP))
        budget = self._new(min(budget, 1.0), 1 - _STEP if good else 1 + _STEP)
        if not good:
            return budget
        predicted = self.predictor.psnr_db(self.solver.solve(budget).loss)
        is_hopeless = (wanted - predicted) * slope > _HOPE_DB + _AIM_DB
        return None if is_hopeless or budget >= min(good) else budget

    def _aim(self, target_db: float) -> float:
        """Return the PSNR to aim at: every further trial in a row on one side of the target moves
        it to the other side, as scatter lets the line settle where all of them miss.
        """
        sides = [t.score.mean_psnr_db >= target_db for t in self.trials]
        run = next((n for n, side in enumerate(reversed(sides)) if side != sides[-1]), len(sides))
        return target_db + _AIM_DB + _HASTE_DB * (run - 1) * (-1 if sides[-1] else 1)

    def _new(self, budget: float, pace: float) -> float:
        """Return the first budget from here on, by steps of `pace`, with a plan not yet tried.

        The least there is, or 1, when there is none.
        """
        tried = [t.solution.choice for t in self.trials]
        while budget < 1:
            solvable = self._solvable(budget)
            choice = self.solver.solve(solvable).choice
            if solvable != budget or not any(torch.equal(choice, other) for other in tried):
                return solvable
            budget *= pace
        return 1.0

    def _line(self, aim_db: float) -> tuple[float, float]:
        """Return the predicted PSNR at which `aim_db` is expected, and dB realised per dB.

        A straight line through predicted and realised PSNR of the trials, those near the aim
        counting most, drawn towards a slope of one.
        """
        points = [(t.predicted_db, t.score.mean_psnr_db) for t in self.trials]
        weights = [1 / (1 + (y - aim_db) ** 2 / 4) for _, y in points]
        total = sum(weights)
        x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        both = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True))
        square = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = min(max((both + _PRIOR * max(weights)) / (square + _PRIOR * max(weights)), 0.2), 5)
        return x0 + (aim_db - y0) / slope, slope
