"""Methods beside each other: any plan over heads, steps, layers and branches is its parts."""

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from toys import generate

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods import METHODS, GridMethod, Method, build
from dittools.methods.headhunter import HeadHunter
from dittools.patches import attach
from dittools.patches.inputs import lacking
from dittools.patches.root import Root
from dittools.patches.runtime import Runtime, Tally
from dittools.patches.sites import SeamCall
from dittools.pipelines import tiny
from dittools.plans import Plan
from dittools.plans.plan import Rule, Schedule

BACKEND = ReferenceBackend()
STEPS = 4


def small(name: str) -> Method:
    """The method with blocks small enough to drop something of a few dozen tokens.

    Every head keeps its own share: one threshold for all heads is no matter of one head.
    """
    known = {f.name: f for f in fields(METHODS[name])}
    least = known["block_size"].metadata["least"] or 16 if "block_size" in known else 0
    given: dict[str, Any] = {"block_size": max(16, least)} if least else {}
    return build(name, {**given, "per_head": True} if "per_head" in known else given)


class Stock(SeamCall):
    """A call whose stock function is the reference."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__(call.query, call.key, call.value, {}, 0)
        object.__setattr__(self, "call", call)

    heads_first = False  # type: ignore[assignment]

    def dense(self) -> torch.Tensor:
        call: AttentionCall = self.call  # type: ignore[attr-defined]
        return BACKEND.dense(call)


def inputs(grid: TokenGrid, heads: int, layer: int, step: int, branch: str = "") -> AttentionCall:
    """One call of a run, the same every time it is asked for."""
    draw = torch.Generator().manual_seed(layer * 31 + step * 7 + (branch == "uncond"))
    q, k, v = (torch.randn(1, grid.total, heads, 16, generator=draw) for _ in range(3))
    features = torch.randn(1, grid.tokens, 32, generator=draw)
    place = slice(grid.text_before, grid.text_before + grid.tokens)
    return AttentionCall(
        q,
        k,
        v,
        grid,
        layer=layer,
        step=step,
        steps=STEPS,
        branch=branch,
        features=features,
        unrotated=q[:, place],
    )


def alone(method: Method, call: AttentionCall, heads: tuple[int, ...]) -> torch.Tensor:
    """What one method makes of some heads; dense where it cannot run them."""
    part = call.heads(heads)
    if method.not_supported(part) or lacking(method, part):
        return BACKEND.dense(part)
    return method.attend(part, BACKEND)


def together(rules: Any, call: AttentionCall) -> tuple[torch.Tensor, Tally]:
    """What the attachment makes of one call under the rules of a plan."""
    runtime, tally = Runtime(Plan(), BACKEND, None, True), Tally()
    root = Root("transformer", None, runtime)  # type: ignore[arg-type]
    return root._run(call, rules, Stock(call), tally), tally


@pytest.mark.parametrize("seed", range(6))
def test_any_plan_is_its_methods_head_by_head(seed: int) -> None:
    """Heads, layers, steps and branches at random; memories live as long as in a run."""
    draw = random.Random(seed)
    heads = draw.randint(2, 5)
    text = draw.choice([(0, 0), (3, 0), (0, 5)])
    grid = TokenGrid(draw.randint(1, 4), draw.randint(3, 7), draw.randint(3, 7), *text)
    rules = tuple(
        Rule(
            small(draw.choice(sorted(METHODS))),
            layers=draw.choice(["all", (0,), (1,)]),
            heads=draw.choice(["all", tuple(draw.sample(range(heads), draw.randint(1, heads)))]),
            steps=draw.choice(["all", (0.0, 0.5), (0.25, 1.0)]),
            branch=draw.choice(["all", "cond", "uncond"]),
        )
        for _ in range(5)
    )
    plan = Plan(rules, Schedule(draw.choice([0, 1])))
    memories: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            for layer in (0, 1):
                found = plan.rules_for(layer, f"blocks.{layer}", step, STEPS, heads, branch)
                assert sorted(h for some, _ in found for h in some) == list(range(heads))
                mixed, single = memories.setdefault((layer, branch), ({}, {}))
                call = inputs(grid, heads, layer, step, branch)
                out, _ = together(found, replace(call, memory=mixed))
                for head, method in ((h, method) for some, method in found for h in some):
                    want = alone(method, replace(call, memory=single), (head,))[:, :, 0]
                    torch.testing.assert_close(
                        out[:, :, head], want, atol=2e-6, rtol=1e-5, msg=f"{method} on {found}"
                    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_heads_that_change_places_leave_their_memory_behind(name: str) -> None:
    """What was learnt of heads 0 and 1 says nothing about heads 1 and 2, one method or not."""
    grid, method = TokenGrid(4, 6, 6), small(name)
    mixed: dict[str, Any] = {}
    own: dict[tuple[int, ...], dict[str, Any]] = {(0, 1): {}, (1, 2): {}}
    for step in range(STEPS):
        some = (0, 1) if step < STEPS // 2 else (1, 2)
        rest = tuple({0, 1, 2} - {*some})
        call = replace(inputs(grid, 3, 0, step), memory=mixed)
        out, _ = together([(some, method), (rest, build("dense"))], call)
        part = replace(call.heads(some), memory=own[some])
        want = BACKEND.dense(part)
        if not (method.not_supported(part) or lacking(method, part)):
            want = method.attend(part, BACKEND)
        torch.testing.assert_close(out[:, :, list(some)], want, atol=2e-6, rtol=1e-5)


GRID_METHODS = [
    name for name in METHODS if isinstance(build(name), GridMethod) and name != "sparse_vdit"
]


@pytest.mark.parametrize("seed", range(5))
def test_the_counter_is_the_mean_of_the_closed_forms(seed: int) -> None:
    draw = random.Random(seed)
    grid = TokenGrid(draw.randint(2, 5), draw.randint(4, 9), draw.randint(4, 9), 0, 3)
    names = draw.sample(GRID_METHODS, 3)
    groups = [((0, 3), small(names[0])), ((1,), small(names[1])), ((2,), small(names[2]))]
    _, tally = together(groups, inputs(grid, 4, 1, 2))

    def closed_form(method: Method) -> float:
        assert isinstance(method, GridMethod)
        again = grid.text / grid.total if method.name == "freeswim" else 0.0  # at the stock scale
        return method.mask(grid).density + again

    want = sum(len(some) * closed_form(method) for some, method in groups)
    assert float(tally.sparse_density) == pytest.approx(want / 4 if tally.sparse else 0)


@pytest.mark.parametrize("name", GRID_METHODS)
def test_the_density_of_a_mask_is_the_share_of_its_tokens(name: str) -> None:
    """On any grid; masks of whole blocks count a ragged tail whole."""
    draw = random.Random(name)
    for _ in range(8):
        text = draw.choice([(0, 0), (5, 0), (0, 9), (2, 3)])
        grid = TokenGrid(draw.randint(1, 5), draw.randint(1, 11), draw.randint(1, 11), *text)
        method = small(name)
        assert isinstance(method, GridMethod)
        mask = method.mask(grid)
        dense = mask.to_dense()
        if mask.tiles is not None or mask.pairs is not None or grid.total % mask.q_block == 0:
            assert mask.density == pytest.approx(float(dense.double().mean()), abs=1e-9)
        else:
            kept = mask.keep.double().mean()
            assert mask.density == pytest.approx(float(kept))
        assert bool(dense.any(-1).all()), "a query without a key"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_pipelines_and_two_sizes_in_turns_share_nothing(name: str) -> None:
    """Interleaved runs give what each gives alone, whatever a method remembers."""
    method, sizes = small(name), (TokenGrid(3, 5, 6), TokenGrid(2, 6, 8, 0, 4))

    def run(memory: dict[str, Any], grid: TokenGrid, step: int) -> torch.Tensor:
        call = replace(inputs(grid, 2, 1, step), memory=memory)
        return alone(method, call, (0, 1))

    apart = []
    for grid in sizes:
        memory: dict[str, Any] = {}
        apart.append([run(memory, grid, step) for step in range(STEPS)])
    memories: list[dict[str, Any]] = [{}, {}]
    for step in range(STEPS):
        for which, grid in enumerate(sizes):
            assert torch.equal(run(memories[which], grid, step), apart[which][step])


@pytest.mark.parametrize(("heads", "is_split"), [((0, 1), False), ((1,), True)])
def test_guidance_and_agents_compose_or_say_why_not(heads: tuple[int, ...], is_split: bool) -> None:
    """A perturbed pass without some heads knows no query before RoPE, so agents run dense there."""
    pipe = tiny.build("wan")
    pipe.set_progress_bar_config(disable=True)
    plan = Plan((Rule(small("gna")), Rule(small("agent"), heads=heads)))
    with attach(pipe, plan, guidance=HeadHunter(["L0H0"], scale=1.0), backend="cpu") as handle:
        made = generate(pipe, "wan", num_inference_steps=2)
        report = handle.report()
    assert bool(made.isfinite().all())
    assert report.guidance
    assert any("some of the heads only" in reason for reason in report.fallbacks) == is_split


@pytest.mark.parametrize("name", ["wan", "flux", "sd"])
def test_a_mixed_plan_runs_on_a_pipeline_and_says_what_stayed_dense(name: str) -> None:
    """Agents, merging and a window on some heads each, a mask on the last ones."""
    pipe = tiny.build(name)
    pipe.set_progress_bar_config(disable=True)
    kinds = [small(n) for n in ("gna", "agent", "tome", "freeswim")]
    plan = Plan(
        (
            Rule(kinds[0]),
            Rule(kinds[1], heads=(0,), steps=(0.0, 0.5)),
            Rule(kinds[2], heads=(0,), steps=(0.5, 1.0)),
            Rule(kinds[3], heads=(1,), layers=(0,)),
        )
    )
    stock = generate(pipe, name, num_inference_steps=2)
    with attach(pipe, plan, backend="cpu") as handle:
        made = generate(pipe, name, num_inference_steps=2)
        report = handle.report()
    assert bool(made.isfinite().all())
    assert report.coverage["never_fired"] == {}
    assert all("\n" not in reason for reason in report.fallbacks)
    assert torch.equal(generate(pipe, name, num_inference_steps=2), stock)
