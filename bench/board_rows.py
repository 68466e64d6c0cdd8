"""Measuring the rows of the scoreboard: one generation at a time, each kept with its revision."""

import ast
import hashlib
import inspect
import math
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods import METHODS, Method, to_params
from dittools.metrics.fidelity import compare
from dittools.metrics.prompt_score import score_clip
from dittools.patches import attach
from dittools.patches.timing import Stopwatch
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan
from dittools.searching.ladders import Ladder, ladders_for
from dittools.searching.measure import plan_digest
from dittools.searching.store import Result, Store, fingerprint

NUMBERS = ("psnr_db", "ssim", "density", "computed", "attention_s", "whole_s", "prompt", "details")
CLOSE = 0.006  # a density this near to the one asked for is not refined further
NEAR = 0.03  # a row counts as matched when its density is this close
_TRIES = 5


class Missing(Exception):
    """A result that is not there yet, where none may be made."""


@dataclass(frozen=True)
class Row:
    """One row of one density: a name, what it is, and the plan that runs."""

    name: str
    kind: str  # method, searched, floor, ceiling, reference
    plan: Plan
    density: float  # asked for
    detail: str = ""
    seed_shift: int = 0


class CpuWatch(Stopwatch):
    """CPU seconds of this thread, less what counting blocks took."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def running(self, device: torch.device) -> Any:
        return _Span(self)


class _Span:
    def __init__(self, watch: CpuWatch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        self.start = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.watch.seconds += time.thread_time() - self.start


class Counting:
    """A backend that also adds up the share of blocks it visits."""

    def __init__(self, backend: Any, watch: CpuWatch) -> None:
        self.backend, self.watch, self.name = backend, watch, backend.name
        self.visited = 0.0

    def not_supported(self, call: Any, mask: BlockMask | None = None) -> list[str]:
        found: list[str] = self.backend.not_supported(call, mask)
        return found

    def prefers_dense(self, call: Any, mask: BlockMask) -> bool:
        return False

    def dense(self, call: Any) -> torch.Tensor:
        self._add(call, 1.0)
        out: torch.Tensor = self.backend.dense(call)
        return out

    def block_sparse(self, call: Any, mask: BlockMask, **options: Any) -> Any:
        start = time.thread_time()
        self._add(call, mask.computed)
        self.watch.seconds -= time.thread_time() - start
        return self.backend.block_sparse(call, mask, **options)

    def _add(self, call: Any, share: float) -> None:
        batch, tokens, heads, _ = call.query.shape
        self.visited += share * batch * tokens * call.key.shape[1] * heads


def revision() -> str:
    """Return the git revision of the code that runs, with a plus when it was changed since."""
    where = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "dittools")
    return (git("rev-parse", "--short=9", "HEAD") or "unknown") + ("+" if changed else "")


def source_digest(methods: list[Method]) -> str:
    """Return a digest of the code of methods: comments and docstrings do not count."""
    seen: dict[str, str] = {}
    waiting = [sys.modules[type(m).__module__] for m in methods]
    while waiting:
        module = waiting.pop()
        if module.__name__ in seen:
            continue
        seen[module.__name__] = _plain_source(module)
        for value in vars(module).values():
            name = value.__name__ if isinstance(value, types.ModuleType) else None
            name = name or getattr(value, "__module__", "")
            if str(name).startswith("dittools.methods.") and name != "dittools.methods.presets":
                waiting.append(sys.modules[str(name)])
    return hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest()[:12]


def _plain_source(module: types.ModuleType) -> str:
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        is_scope = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if is_scope and body and isinstance(body[0], ast.Expr):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[union-attr]
    return ast.dump(tree)


class Judge:
    """Generates with plans and keeps every result.

    Args:
        pipe: the demo pipeline.
        store: where results are kept.
        may_generate: asked before every generation; False raises Missing.
    """

    def __init__(self, pipe: Any, store: Store, may_generate: Callable[[], bool]) -> None:
        self.pipe, self.store, self.may_generate = pipe, store, may_generate
        self.revision = revision()

    def numbers(self, plan: Plan, settings: Settings, seed_shift: int = 0) -> dict[str, Any]:
        """Return the numbers of one generation, by name, and the revision they were measured at."""
        code = source_digest([rule.method for rule in plan.rules])
        key = f"board {plan_digest(plan)} {code} {fingerprint(settings.to_dict())} {seed_shift}"
        found = self.store.once(key, lambda: self._measure(plan, settings, seed_shift))
        values = dict(zip(NUMBERS, found["numbers"].tolist(), strict=True))
        return {**values, "revision": bytes(found["revision"].tolist()).decode()}

    def _measure(self, plan: Plan, settings: Settings, seed_shift: int) -> Result:
        reference = self._dense(settings).numpy()
        use = replace(settings, seed=settings.seed + seed_shift)
        if not self.may_generate():
            raise Missing
        start = time.thread_time()
        with attach(self.pipe, plan, backend="cpu") as handle:
            runtime = handle.runtime
            watch = runtime.attention = CpuWatch()
            counting = runtime.backend = Counting(runtime.backend, watch)  # type: ignore[assignment]
            frames = generate(self.pipe, use).frames
            report = handle.report()
        whole = time.thread_time() - start
        fidelity = compare(reference, frames)
        sparse = report.calls["sparse"] / max(1, report.calls["sparse"] + report.calls["dense"])
        pairs = self._pairs(report)
        # calls that ran dense by the stock function never reach the backend
        computed = 1 - sparse + counting.visited / pairs if sparse else 1.0
        shown = score_clip(frames, settings.prompt).to_dict()
        asked = [v for k, v in shown.items() if k not in ("objects", "all") and v is not None]
        values = (
            fidelity.psnr_db,
            fidelity.ssim,
            report.density,
            min(computed, 1.0),
            watch.seconds,
            whole,
            float(bool(shown["all"])),
            sum(map(bool, asked)) / max(1, len(asked)),
        )
        mark = torch.tensor(list(self.revision.encode()), dtype=torch.uint8)
        return {"numbers": torch.tensor(values, dtype=torch.float64), "revision": mark}

    def _pairs(self, report: Any) -> float:
        """Return query-key pairs of all eligible calls of a run."""
        model, grid = self.pipe.transformer.config, DEMO_GRID
        calls = report.calls["sparse"] + report.calls["dense"]
        return float(calls * grid.total**2 * model.num_attention_heads)

    def _dense(self, settings: Settings) -> torch.Tensor:
        def make() -> Result:
            if not self.may_generate():
                raise Missing
            return {"frames": torch.from_numpy(generate(self.pipe, settings).frames.copy())}

        return self.store.once(f"dense {fingerprint(settings.to_dict())}", make)["frames"]


DEMO_GRID = TokenGrid(12, 12, 12)


def plan_of(method: Method, warm_up: float) -> Plan:
    """Return the plan of one method on all steps but a dense start."""
    return Plan.of(method, dense_first_steps=warm_up)


def matched(
    judge: Judge, ladder: Ladder, density: float, settings: Settings, warm_up: float
) -> tuple[Method, float]:
    """Return the method of a ladder whose density in a generation is nearest to the one wanted.

    Args:
        judge: generates.
        ladder: variants of the method.
        density: of the whole run, a dense start included.
        settings: a generation that is not on the board.
        warm_up: share of steps that stay dense.
    """
    aim = (density - warm_up) / (1 - warm_up)
    tried: list[tuple[float, float, Method]] = []  # aimed at, came out, method
    for _ in range(1 if ladder.fixed else _TRIES):
        method = ladder.make(aim)
        if any(to_params(method) == to_params(m) for _, _, m in tried):
            break
        found = judge.numbers(plan_of(method, warm_up), settings)["density"]
        tried.append((aim, found, method))
        if abs(found - density) <= CLOSE:
            break
        aim = _next(tried, density)
    _, found, method = min(tried, key=lambda t: abs(t[1] - density))
    return method, found


def _next(tried: list[tuple[float, float, Method]], density: float) -> float:
    """Return where to aim next: along the line through the two nearest tries, in logarithms."""
    near = sorted(tried, key=lambda t: abs(t[1] - density))[:2]
    (x, y, _), slope = near[0], 1.0
    if len(near) == 2 and near[0][0] != near[1][0] and near[0][1] != near[1][1]:
        slope = math.log(near[0][1] / near[1][1]) / math.log(near[0][0] / near[1][0])
    step = math.log(density / y) / slope if slope > 0.05 else math.copysign(0.7, density - y)
    return min(max(x * math.exp(min(max(step, -1.6), 1.6)), 0.004), 0.98)


def method_row(
    judge: Judge,
    name: str,
    density: float,
    calibration: list[Settings],
    warm_up: float,
    label: str | None = None,
) -> Row | None:
    """Return the row of a method: the ladder that does best on prompts that are not on the board.

    None where the method has no density to set.

    Args:
        judge: generates.
        name: of the method.
        density: of the whole run.
        calibration: generations that are not on the board.
        warm_up: share of steps that stay dense.
        label: of the one ladder to take.
    """
    best: tuple[tuple[bool, float], Row] | None = None
    ladders = [x for x in ladders_for(name, DEMO_GRID) if label in (None, x.label)]
    for ladder in ladders:
        first = calibration[0] if name != "oracle" else replace(calibration[0], steps=2)
        method, found = matched(judge, ladder, density, first, warm_up)
        plan = plan_of(method, warm_up)
        apart = abs(found - density)
        only = len(ladders) == 1
        psnr = 0.0 if only else _mean(judge, plan, calibration)
        rank = (apart <= NEAR, psnr if apart <= NEAR else -apart)
        kind = {"random": "floor", "oracle": "ceiling"}.get(name, "method")
        if best is None or rank > best[0]:
            best = (rank, Row(name, kind, plan, density, ladder.label))
    return None if best is None else best[1]


def _mean(judge: Judge, plan: Plan, settings: list[Settings]) -> float:
    found = [judge.numbers(plan, use)["psnr_db"] for use in settings]
    return sum(found) / len(found)


def all_methods() -> list[str]:
    """Return the methods that get a row."""
    return [name for name in METHODS if name != "dense"]
