"""Greedy search for the attention heads whose perturbation guides best (HeadHunter).

Every round scores each head left in the pool beside the heads chosen so far, on the same prompts
and seeds, and takes the best few. Scores of a round are all taken against the same set.

Source: arXiv:2506.10978, algorithm 1 and appendix D.
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import DitToolsError, InputError
from dittools.methods.headhunter import HeadHunter, head_name, parse_head
from dittools.metrics.preference import Scorer, named_scorer
from dittools.patches import attach, detach
from dittools.patches.attach import find_targets, model_facts
from dittools.patches.guide import all_heads, check_pipeline, selected_heads
from dittools.pipelines.generate import Settings, call_arguments, generate
from dittools.pipelines.output import disk_errors, write_text
from dittools.pipelines.ranks import is_main
from dittools.plans import Plan
from dittools.searching.profile import HeadProfile, guidance_page, profiles
from dittools.searching.request import settings_for
from dittools.searching.run import versions, work_folder
from dittools.searching.scout import named_backend
from dittools.searching.store import ROOM, Report, Result, Store, Unit, fingerprint

Generate = Callable[[tuple[str, ...], Settings], float]  # heads perturbed, generation -> score


@dataclass(frozen=True)
class Hunt:
    """What a search looks for.

    Attributes:
        rounds: R.
        top_k: heads added in each round.
        scale: weight of the guidance while searching.
        u: strength of the perturbation while searching.
        mode: "joint" or "image".
    """

    rounds: int = 1
    top_k: int = 3
    scale: float = 3.0
    u: float = 1.0
    mode: str = "joint"

    def __post_init__(self) -> None:
        """Refuse counts below 1; the rest is checked as guidance."""
        for name in ("rounds", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is not usable", expected="at least 1", got=repr(value))
        self.guidance(("L0H0",))

    def guidance(self, heads: tuple[str, ...]) -> HeadHunter:
        """Return the guidance that perturbs these heads."""
        return HeadHunter(heads, self.scale, self.u, self.mode)  # type: ignore[arg-type]

    def generations(self, pool: int, prompts: int) -> int:
        """Return what the search costs: prompts x sum over rounds of the heads left in the pool."""
        return prompts * sum(pool - self.top_k * done for done in range(self.rounds))


@dataclass(frozen=True)
class Round:
    """One round: the score of every candidate beside the heads chosen before, and the winners."""

    scores: dict[str, float]
    chosen: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        heads: in the order they were chosen; every prefix is usable.
        rounds: one entry each.
        baseline: mean score without guidance, same prompts and seeds.
        generations: of the search, exactly prompts x sum of the pools; the baseline's are apart.
        plan: holds the guidance; it has no rules, so attention stays dense unless combined.
        details: what is written to guidance.json.
        files: written, by what they are.
    """

    heads: tuple[str, ...]
    rounds: tuple[Round, ...]
    baseline: float
    generations: int
    plan: Plan
    details: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def gains(self) -> dict[str, float]:
        """What each head of the pool gained alone, over no guidance."""
        return {head: score - self.baseline for head, score in self.rounds[0].scores.items()}


def greedy(
    pool: Sequence[str],
    rounds: int,
    top_k: int,
    score: Callable[[tuple[str, ...], Sequence[str]], Sequence[float]],
) -> list[Round]:
    """Return the rounds of a greedy search.

    Args:
        pool: every head once.
        rounds: R.
        top_k: heads taken in each round.
        score: (chosen so far, candidates) to one score per candidate, more is better.
    Raises:
        InputError: the pool is too small, or a score is no number.
    """
    if rounds * top_k > len(pool):
        raise InputError(
            "the pool of heads is too small",
            expected=f"at least {rounds * top_k} heads for {rounds} rounds of {top_k}",
            got=str(len(pool)),
            remedy="fewer rounds, a smaller top-k, or more heads",
        )
    left = sorted(dict.fromkeys(pool), key=_place)
    chosen: tuple[str, ...] = ()
    done = []
    for _ in range(rounds):
        scores = dict(zip(left, score(chosen, left), strict=True))
        bad = [head for head, value in scores.items() if not math.isfinite(value)]
        if bad:
            raise InputError("a score is not a number", got=f"{scores[bad[0]]} for {bad[0]}")
        winners = tuple(sorted(left, key=lambda h: (-scores[h], _place(h)))[:top_k])
        done.append(Round(scores, winners))
        chosen += winners
        left = [head for head in left if head not in winners]
    return done


def _place(head: str) -> tuple[int, int]:
    layer, number = parse_head(head)
    return layer, number or 0


def search_guidance(
    pipe: Any,
    prompts: Sequence[str],
    scorer: str | Scorer = "demo",
    *,
    rounds: int = 1,
    top_k: int = 3,
    scale: float = 3.0,
    u: float = 1.0,
    mode: str = "joint",
    heads: Sequence[str] = (),
    plan: Plan | None = None,
    backend: str = "auto",
    work: Path | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> Found:
    """Return the heads whose perturbation raises a score most, found greedily.

    The same inputs give the same heads, on one process or on several. Prompt j is generated with
    seed + j, the same noise for every candidate.

    Args:
        pipe: a stock pipeline; what is attached to it is taken off.
        prompts: M texts.
        scorer: "demo", "clip=FOLDER", "pickscore=FOLDER", "aesthetic=FOLDER", "imagereward=FILE",
            "package.module:function", or a function (frames [F, H, W, 3] in 0..1, prompt) -> float.
        rounds: R, each adds `top_k` heads.
        top_k: k.
        scale: weight of the guidance.
        u: strength; 1 while searching shows effects clearly.
        mode: "joint" or "image".
        heads: the pool, as in HeadHunter; empty for every head.
        plan: sparse attention to search under; it stays in the plan that is found.
        backend: a named attention backend, or "auto" for the device's.
        work: folder of finished units: a killed search goes on where it was.
        progress: called with (what, generations done, in all).
        **settings: height, width, frames, steps, guidance, negative_prompt, seed. Without
            guidance, classifier-free guidance is off.
    Raises:
        InputError: bad options, a pool that is too small, a scorer that cannot be loaded.
        AttachError: guidance makes no sense on this pipeline.
    """
    hunt = Hunt(rounds, top_k, scale, u, mode)
    if not prompts:
        raise InputError("no prompts", expected="at least one")
    judge = named_scorer(scorer)
    target = find_targets(pipe)[0]
    check_pipeline(pipe, target.denoiser)
    paths = target.guided_paths
    pool = _pool(tuple(heads), target.denoiser, paths)
    use = guided_settings(pipe, settings)
    pairs = [replace(use, prompt=p, seed=use.seed + j) for j, p in enumerate(prompts)]
    call_arguments(pipe, pairs[0])  # raises before anything runs
    detach(pipe)
    base = plan or Plan()
    base.check(model_facts(target.denoiser, target.paths))
    backend = named_backend(pipe, backend)
    store = Store(work_folder(pipe, work, backend), progress)

    def run(chosen: tuple[str, ...], pair: Settings) -> float:
        guidance = hunt.guidance(chosen) if chosen else None
        with attach(pipe, base, guidance=guidance, backend=backend, recorder=False):
            return judge(generate(pipe, pair).frames, pair.prompt)

    mark = fingerprint(asdict(hunt) | {"rounds": 0, "top_k": 0}, judge.mark, _digest(base))
    found, baseline = _search(store, run, hunt, pool, pairs, mark)
    chosen = tuple(head for one in found for head in one.chosen)
    details = _details(hunt, judge.name, pairs, pool, found, baseline)
    facts = model_facts(target.denoiser, target.paths)
    made = replace(
        base,
        model=replace(facts, paths=()),
        guidance=hunt.guidance(chosen),
        provenance={**base.provenance, "guidance": _provenance(details)},
    )
    cost = details["generations"]
    return Found(chosen, tuple(found), baseline, cost, made, details)


def _search(
    store: Store, run: Generate, hunt: Hunt, pool: list[str], pairs: list[Settings], mark: str
) -> tuple[list[Round], float]:
    """Return the rounds and the mean score without guidance; one unit of work per generation."""

    def unit(number: int, heads: tuple[str, ...], pair: Settings) -> Unit:
        def make() -> Result:
            return {"score": torch.tensor(run(heads, pair), dtype=torch.float64)}

        # the set decides the picture, not the order it was found in
        names = sorted(heads, key=_place)
        key = f"guidance {mark} {fingerprint(names, pair.to_dict())}"
        return Unit(key, number, make)

    def scored(what: str, sets: list[tuple[str, ...]]) -> list[float]:
        units = [
            unit(place * len(pairs) + j, heads, pair)
            for place, heads in enumerate(sets)
            for j, pair in enumerate(pairs)
        ]
        values = [float(result["score"]) for result in store.run(what, units)]
        size = len(pairs)
        return [sum(values[i * size : (i + 1) * size]) / size for i in range(len(sets))]

    baseline = scored("without guidance", [()])[0]
    number = 0

    def score(chosen: tuple[str, ...], candidates: Sequence[str]) -> list[float]:
        nonlocal number
        number += 1
        sets = [(*chosen, head) for head in candidates]
        return scored(f"round {number} of {hunt.rounds}", sets)

    return greedy(pool, hunt.rounds, hunt.top_k, score), baseline


def guided_settings(pipe: Any, given: dict[str, Any]) -> Settings:
    """Return the settings of a search: classifier-free guidance off unless asked for.

    A model that takes its guidance scale as an input (Flux.1 dev) keeps its own default.
    """
    wanted = dict(given)
    denoiser = find_targets(pipe)[0].denoiser
    config = getattr(denoiser, "config", None)
    takes_scale = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
    distilled = getattr(config, "guidance_embeds", False)
    if wanted.get("guidance") is None and takes_scale and not distilled:
        wanted["guidance"] = 1.0
    return settings_for(pipe, wanted)


def _pool(heads: tuple[str, ...], denoiser: torch.nn.Module, paths: list[str]) -> list[str]:
    if not heads:
        return all_heads(denoiser, paths)
    found = selected_heads(HeadHunter(heads), denoiser, paths)
    return [head_name(paths.index(path), head) for path, chosen in found.items() for head in chosen]


def _digest(plan: Plan) -> str:
    from dittools.searching.measure import plan_digest

    return plan_digest(plan)


def _details(
    hunt: Hunt,
    scorer: str,
    pairs: list[Settings],
    pool: list[str],
    rounds: list[Round],
    baseline: float,
) -> dict[str, Any]:
    settings = {k: v for k, v in pairs[0].to_dict().items() if k not in ("prompt", "seed")}
    return {
        "format": "dittools-guidance",
        "version": 1,
        "versions": versions(),
        **asdict(hunt),
        "scorer": scorer,
        "settings": settings,
        "pairs": [[pair.prompt, pair.seed] for pair in pairs],
        "pool": len(pool),
        "generations": hunt.generations(len(pool), len(pairs)),
        "baseline_generations": len(pairs),
        "baseline": baseline,
        "heads": [head for one in rounds for head in one.chosen],
        "found": [{"chosen": list(one.chosen), "scores": one.scores} for one in rounds],
    }


def _provenance(details: dict[str, Any]) -> dict[str, Any]:
    kept = ("rounds", "top_k", "scorer", "pool", "generations", "baseline", "settings")
    last = details["found"][-1]
    return {
        "by": "dittools search --objective guidance",
        **{name: details[name] for name in kept},
        "prompts": len(details["pairs"]),
        "best_of_last_round": last["scores"][last["chosen"][0]],
    }


def write_guidance(
    pipe: Any,
    found: Found,
    prompts: Sequence[str],
    out: Path,
    *,
    work: Path | None = None,
    with_atlas: bool = True,
    progress: Report | None = None,
) -> dict[str, Path]:
    """Write the plan, guidance.json and guidance.html; each appears whole or not at all.

    Args:
        pipe: the pipeline that was searched.
        found: what was found.
        prompts: the first is looked at for the atlas.
        out: plan file; the others are written beside it.
        work: folder of finished units.
        with_atlas: whether the page joins the gains with the atlas of `inspect`, which takes one
            more generation in which every candidate is measured.
        progress: as for the search.
    Returns:
        The files by what they are; empty in all processes but the first.
    Raises:
        InputError: the disk is full or the folder cannot be written to; old files stay whole.
    """
    found_profiles: list[HeadProfile] = []
    remark = "it was switched off"
    if with_atlas:
        found_profiles, remark = _profiles(pipe, found, prompts, work, progress)
    if not is_main():
        return {}
    files = {
        "plan": out,
        "guidance": out.parent / "guidance.json",
        "report": out.parent / "guidance.html",
    }
    details = {**found.details, "profile": [asdict(one) for one in found_profiles]}
    with disk_errors(f"cannot write the results to {out.parent}", ROOM):
        write_text(files["guidance"], json.dumps(details, indent=1) + "\n")
        write_text(files["report"], guidance_page(found.details, found_profiles, remark))
        found.plan.save(out)  # last: a plan file means that the rest is there
    found.files.update(files)
    return files


def _profiles(
    pipe: Any, found: Found, prompts: Sequence[str], work: Path | None, progress: Report | None
) -> tuple[list[HeadProfile], str]:
    """Return the head profiles, or why there are none: some models have no single atlas."""
    from dittools.searching.inspect import atlas

    settings = dict(found.details["settings"])
    target = find_targets(pipe)[0]
    sites = [target.paths.index(path) for path in target.guided_paths]
    try:
        seen = atlas(pipe, list(prompts[:1]), work=work, progress=progress, **settings)
    except DitToolsError as error:
        return [], str(error)
    return profiles(seen, found.gains, sites), ""
