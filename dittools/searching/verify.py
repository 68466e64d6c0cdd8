"""The verification loop: generate held-out prompts with the plan, then tighten or relax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dittools.errors import InputError
from dittools.pipelines.generate import Settings
from dittools.searching.allocate import Unreachable
from dittools.searching.measure import Bench, Score
from dittools.searching.solver import Predictor, Solution, Solver

DENSITY_SLACK = 0.002  # a realised share of pairs this far above the target still meets it
PSNR_SLACK_DB = 0.5  # how much better than asked for is close enough
_AIM_DB = 0.2  # above the target, so that the next plan lands inside the slack
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
        """Return the trial of one budget."""
        solution = self.solver.solve(budget)
        score = self.bench.score("verifying", solution.plan, self.settings)
        trial = Trial(budget, solution, self.predictor.psnr_db(solution.loss), score)
        self.trials.append(trial)
        self.notice(trial)
        return trial

    def within(self, target: float, realised: Callable[[Trial], float], slack: float) -> Verdict:
        """Tighten the budget until what was realised is within the target.

        Methods that look at query and key keep another share than they did in calibration.

        Raises:
            Unreachable: no plan is that cheap.
        """
        budget = target
        for _ in range(self.rounds):
            trial = self.attempt(budget)
            found = realised(trial)
            if found <= target + slack:
                return Verdict(trial, self.trials, True, f"met after {len(self.trials)} plan(s)")
            budget *= target / found * 0.995
        best = min(self.trials, key=realised)
        remark = f"not met in {self.rounds} rounds: {realised(best):.3f} is the closest"
        return Verdict(best, self.trials, False, remark)

    def at_least(self, target_db: float) -> Verdict:
        """Find the cheapest plan whose held-out PSNR is at least the target, within half a dB.

        Raises:
            InputError: no plan within the constraints gets there; says which PSNR is reachable.
        """
        guess = self._guess(target_db + _AIM_DB)
        for _ in range(self.rounds):
            trial = self.attempt(guess)
            if 0 <= trial.score.mean_psnr_db - target_db <= PSNR_SLACK_DB:
                break
            following = self._next(target_db)
            if following is None:
                break
            guess = following
        good = [t for t in self.trials if t.score.mean_psnr_db >= target_db]
        if not good:
            good = [t for t in [self.attempt(1.0)] if t.score.mean_psnr_db >= target_db]
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

    def _guess(self, wanted_db: float) -> float:
        """Return the least budget whose predicted PSNR is enough."""
        for budget in _GRID:
            try:
                solution = self.solver.solve(budget)
            except Unreachable:
                continue
            if self.predictor.psnr_db(solution.loss) >= wanted_db:
                return budget
        return 1.0

    def _next(self, target_db: float) -> float | None:
        """Return the next budget: between the nearest misses on both sides, or along prediction.

        None when the range between them is closed, or the cheapest plan is good enough.
        """
        aim = target_db + _AIM_DB
        poor = [t for t in self.trials if t.score.mean_psnr_db < target_db]
        good = [t for t in self.trials if t.score.mean_psnr_db >= target_db]
        if poor and good:
            low = max(poor, key=lambda t: t.budget)
            high = min(good, key=lambda t: t.budget)
            if high.budget - low.budget < 1e-3:
                return None
            span = min(high.score.mean_psnr_db, 2 * aim) - low.score.mean_psnr_db
            share = (aim - low.score.mean_psnr_db) / span if span > 0 else 0.5
            return low.budget + min(max(share, 0.15), 0.85) * (high.budget - low.budget)
        last = self.trials[-1]
        residual = last.score.mean_psnr_db - last.predicted_db
        guess = self._guess(aim - residual)
        if poor:
            return None if last.budget >= 1 else min(max(guess, last.budget + 0.02), 1.0)
        lower = min(guess, last.budget - 0.02)
        try:
            self.solver.solve(lower)
        except Unreachable as error:
            least = error.least * 1.0001
            return None if least >= last.budget - 1e-3 else least
        return lower
