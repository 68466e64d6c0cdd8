"""HeadHunter: perturbed heads, the guidance they give, and the search that finds them."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dittools
from dittools.commands.terminal import guidance_of
from dittools.errors import AttachError, InputError, PlanError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.methods import METHODS, build
from dittools.methods.headhunter import HeadHunter, self_and_text
from dittools.metrics.preference import Scorer, named_scorer
from dittools.metrics.prompt_score import prompt_margins
from dittools.metrics.scene import parse
from dittools.patches import attach
from dittools.patches.attach import find_targets
from dittools.patches.batch import Rows
from dittools.patches.guide import Guide
from dittools.patches.perturb import HEADWISE, perturb
from dittools.patches.sites import ORIGINALS, SeamCall
from dittools.pipelines import tiny
from dittools.pipelines.demo.clips import draw, random_clip
from dittools.plans import Plan, Rule
from dittools.searching.guidance import Hunt, greedy, search_guidance
from dittools.searching.profile import guidance_page, profiles, rank_correlation

CPU_SDPA = ORIGINALS.add(F.scaled_dot_product_attention, heads_first=True)
GRID = TokenGrid(1, 3, 4, text_before=0, text_after=5)


def seam(heads: int = 4, tokens: int = GRID.total, width: int = 8, batch: int = 2) -> SeamCall:
    q, k, v = torch.randn(3, batch, heads, tokens, width).unbind()
    return SeamCall(q, k, v, {}, CPU_SDPA)


def perturbed(
    call: SeamCall, heads: tuple[int, ...], u: float = 1.0, mode: str = "joint"
) -> torch.Tensor:
    count = call.query.shape[1]
    rules = [(tuple(range(count)), build("dense"))]
    spec = HeadHunter(["L0H0"], u=u, mode=mode)  # type: ignore[arg-type]
    return perturb(call, spec, heads, (GRID,), rules, lambda c, _: c.dense(), False)


# ---- the perturbation -------------------------------------------------------------------------


def test_full_strength_on_all_heads_is_the_value_and_computes_no_attention() -> None:
    call = seam()

    def never(*_: Any) -> torch.Tensor:
        raise AssertionError("a selected head was computed")

    rules = [((0, 1, 2, 3), build("dense"))]
    out = perturb(call, HeadHunter(["L0"]), (0, 1, 2, 3), (GRID,), rules, never, False)
    assert torch.equal(out, call.value)


def test_full_strength_computes_the_unselected_heads_alone() -> None:
    seen = []

    def plain(call: SeamCall, kept: tuple[int, ...] | None) -> torch.Tensor:
        seen.append((kept, call.query.shape[1]))
        return call.dense()

    call = seam()
    out = perturb(
        call, HeadHunter(["L0"]), (1, 3), (GRID,), [((0, 1, 2, 3), build("dense"))], plain, False
    )
    assert seen == [((0, 2), 2)]
    assert torch.equal(out[:, [0, 2]], call.dense()[:, [0, 2]])
    assert torch.equal(out[:, [1, 3]], call.value[:, [1, 3]])


@pytest.mark.parametrize("mode", ["joint", "image"])
def test_output_is_affine_in_u_and_other_heads_are_bit_identical(mode: str) -> None:
    call = seam()
    none, half, full = (perturbed(call, (1, 2), u, mode) for u in (0.0, 0.5, 1.0))
    assert torch.equal(none, call.dense())
    torch.testing.assert_close(half, (none + full) / 2, rtol=1e-5, atol=1e-6)
    assert (full - none)[:, [1, 2]].abs().max() > 0.1
    for out in (half, full):
        assert torch.equal(out[:, [0, 3]], call.dense()[:, [0, 3]])


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 3, 4, 5, 0), TokenGrid(1, 2, 5, 3, 4)])
def test_image_mode_is_masked_attention_with_the_diagonal_kept(grid: TokenGrid) -> None:
    call = seam()
    spec = HeadHunter(["L0"], mode="image")
    rules = [((0, 1, 2, 3), build("dense"))]
    out = perturb(call, spec, (0, 2), (grid,), rules, lambda c, _: c.dense(), False)
    image = torch.zeros(grid.total, dtype=torch.bool)
    image[grid.text_before : grid.text_before + grid.tokens] = True
    keep = ~(image[:, None] & image[None]) | torch.eye(grid.total, dtype=torch.bool)
    want = F.scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=keep)
    torch.testing.assert_close(out[:, [0, 2]], want[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, :, ~image], call.dense()[:, :, ~image])


def test_image_mode_weights_sum_to_one_and_dropped_text_gets_none() -> None:
    q, k = torch.randn(2, 1, GRID.total, 2, 8).unbind()
    image = slice(0, GRID.tokens)
    ones = self_and_text(q, k, torch.ones(1, GRID.total, 2, 8), image, 0.3)
    torch.testing.assert_close(ones, torch.ones(1, GRID.tokens, 2, 8))
    keep = torch.ones(1, GRID.total, dtype=torch.bool)
    keep[:, GRID.tokens :] = False
    value = torch.randn(1, GRID.total, 2, 8)
    alone = self_and_text(q, k, value, image, 0.3, keep)
    torch.testing.assert_close(alone, value[:, image])


@pytest.mark.parametrize("tokens", [1, GRID.total])
def test_one_token_and_constant_values_cannot_be_perturbed(tokens: int) -> None:
    call = seam(tokens=tokens)
    if tokens > 1:
        call = replace(call, value=torch.ones_like(call.value) * 0.7)
    torch.testing.assert_close(perturbed(call, (0, 2)), call.dense(), rtol=1e-5, atol=1e-6)


def test_grouped_key_heads_are_repeated_first() -> None:
    q, k = torch.randn(1, 4, 17, 8), torch.randn(1, 2, 17, 8)
    v = torch.randn(1, 2, 17, 8)
    call = SeamCall(q, k, v, {"enable_gqa": True}, CPU_SDPA)
    out = perturbed(call, (1, 3))
    assert torch.equal(out[:, [1, 3]], v.repeat_interleave(2, 1)[:, [1, 3]])
    torch.testing.assert_close(out[:, [0, 2]], call.dense()[:, [0, 2]])


@pytest.mark.parametrize("name", sorted(HEADWISE - {"dense"}))
def test_methods_that_run_on_fewer_heads_give_each_the_same(name: str) -> None:
    """`HEADWISE` is a promise: leaving heads out changes nothing in the others."""
    grid = TokenGrid(4, 8, 8)
    q, k, v = torch.randn(3, 1, grid.total, 3, 16).unbind()
    method = METHODS[name]()

    def run(heads: list[int]) -> torch.Tensor:
        some = (t[:, :, heads].contiguous() for t in (q, k, v))
        return dittools.attention(*some, grid=grid, method=method, backend="cpu")

    assert torch.equal(run([0, 1, 2])[:, :, [0, 2]], run([0, 2]))


# ---- the guidance -----------------------------------------------------------------------------


class Predictions:
    """What the scheduler is given and what the denoiser predicted, pass by pass."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.passes: list[tuple[str, torch.Tensor]] = []


@contextmanager
def watched(pipe: Any, root: Any) -> Iterator[Predictions]:
    """Record every raw prediction before guidance is added, and every scheduler input."""
    found = Predictions()
    step = type(pipe.scheduler).step

    def note(self: Any, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.steps.append(model_output.clone())
        return step(self, model_output, *args, **kwargs)

    def hook(_m: Any, _a: Any, out: Any) -> None:
        tensor = out[0] if isinstance(out, tuple) else out
        moment = root.moment
        found.passes.append((moment.branch if moment else "", tensor.clone()))

    denoiser = find_targets(pipe)[0].denoiser
    handle = denoiser.register_forward_hook(hook, prepend=True)
    type(pipe.scheduler).step = note
    try:
        yield found
    finally:
        type(pipe.scheduler).step = step
        handle.remove()


def run(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    arguments = {**tiny.call_arguments(name), "num_inference_steps": 2, **more}
    out: Any = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    while isinstance(out, list):
        out = out[0]
    return torch.as_tensor(out)


GUIDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options with and without CFG of 4
    "wan": ({"guidance_scale": 4.0}, {"guidance_scale": 1.0}),
    "flux": ({"negative_prompt": "a", "true_cfg_scale": 4.0}, {}),
    "sd3": ({"guidance_scale": 4.0}, {"guidance_scale": 1.0}),
    "pixart": ({"guidance_scale": 4.0}, {"guidance_scale": 1.0}),
    "sd": ({"guidance_scale": 4.0}, {"guidance_scale": 1.0}),
    "hunyuan_video15": ({}, {}),  # its guider decides
}


@pytest.mark.parametrize("name", GUIDED)
def test_guided_prediction_is_the_formula_with_and_without_cfg(name: str) -> None:
    pipe = tiny.build(name)
    spec = HeadHunter(["L0H0", "L1H1"], scale=3.0)
    for options, g in zip(GUIDED[name], (4.0, None), strict=True):
        if name == "hunyuan_video15":
            pipe.guider = type(pipe.guider)(guidance_scale=4.0 if g else 1.0)
        with attach(pipe, spec) as handle, watched(pipe, handle._roots[0]) as seen:
            run(pipe, name, **options)
            report = handle.report()
        per_step = len({branch for branch, _ in seen.passes})
        own = dict(seen.passes[:per_step])  # of the first step
        if "" in own:
            eps_u, eps_c = own[""].chunk(2) if g else (own[""], own[""])
        else:
            eps_u, eps_c = own.get("uncond", own["cond"]), own["cond"]
        eps_p = own["perturbed"]
        assert (eps_c - eps_p).abs().max() > 1e-4
        assert eps_p.shape[0] == 1, "one row more, not a whole batch"
        want = eps_c + 3.0 * (eps_c - eps_p)
        if g is not None:
            want = eps_u + g * (eps_c - eps_u) + 3.0 * (eps_c - eps_p)
        step = seen.steps[0]
        torch.testing.assert_close(step, want[:, : step.shape[1]], rtol=1e-4, atol=1e-5)
        assert report.guidance is not None
        assert report.guidance["extra_passes"] == len(seen.steps)
        assert report.guidance["extra_ms"] > 0


@pytest.mark.parametrize(("g", "want"), [(None, 2.8), (4.0, 4.0)])
def test_arithmetic_of_the_paper_by_hand(g: float | None, want: float) -> None:
    """eps_c = 1, eps_u = .6, eps_p = .4, scale 3: 2.8 without CFG, 4.0 with g = 4."""
    pipe = tiny.build("wan")
    with attach(pipe, HeadHunter(["L0H0"], scale=3.0)) as handle:
        root = handle._roots[0]
        values = {"cond": 1.0, "uncond": 0.6, "perturbed": 0.4}

        def fixed(_m: Any, _a: Any, out: Any) -> Any:
            assert root.moment is not None
            return (torch.full_like(out[0], values[root.moment.branch]),)

        pipe.transformer.register_forward_hook(fixed, prepend=True)
        with watched(pipe, root) as seen:
            run(pipe, "wan", guidance_scale=g or 1.0)
        forwards = handle.report().forwards
    torch.testing.assert_close(seen.steps[0], torch.full_like(seen.steps[0], want))
    assert forwards == len(seen.steps) * (2 if g is None else 3)


def test_rounding_in_half_precision_is_not_multiplied_by_the_guidance_scale() -> None:
    """Both predictions get the same d, as far as they can hold it."""
    rough, noise = torch.randn(4, 50_000).bfloat16(), torch.randn(2, 50_000)
    eps_u, eps_c = rough[0], (rough[0].float() + 0.2 * noise[0]).bfloat16()
    eps_p = (eps_c.float() + 0.3 * noise[1]).bfloat16()
    both, g, scale = torch.stack((eps_u, eps_c)), 7.5, 8.0
    guide: Any = SimpleNamespace(spec=HeadHunter(["L0H0"], scale=scale))
    (delta,) = Guide._deltas(guide, [both], [eps_p[None]], Rows(2, slice(1, 2), 2, False))
    plain = scale * (eps_c.float() - eps_p.float())
    exact = eps_u.double() + g * (eps_c.double() - eps_u.double()) + plain.double()

    def error(d: torch.Tensor) -> float:
        u, c = ((eps.float() + d).bfloat16().double() for eps in (eps_u, eps_c))
        return float((u + g * (c - u) - exact).norm() / exact.norm())

    assert error(delta[0]) < 0.75 * error(plain)
    wide = both.float()
    (same,) = Guide._deltas(guide, [wide], [eps_p[None]], Rows(2, slice(1, 2), 2, False))
    assert torch.equal(same[0], plain)


FAMILIES = ["wan", "flux", "sd3", "qwen_image", "hunyuan_video15", "pixart", "sdxl", "z_image"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_guided_and_restored(name: str) -> None:
    pipe = tiny.build(name)
    denoiser = find_targets(pipe)[0].denoiser
    before = run(pipe, name)
    with attach(pipe, HeadHunter(["L0"], u=0.0)) as handle:
        assert torch.equal(run(pipe, name), before), "u = 0 must change nothing"
        assert handle.report().guidance["extra_passes"] == 0  # type: ignore[index]
    with attach(pipe, "dense", guidance=HeadHunter(["L0H0"])) as handle:
        joint = run(pipe, name)
        text = str(handle.report())
    with attach(pipe, HeadHunter(["L0H0"], mode="image")):
        image = run(pipe, name)
    assert not torch.equal(joint, before)
    assert "guidance" in text
    assert "L0H0" in text
    has_text = name in ("flux", "sd3", "qwen_image", "hunyuan_video15", "z_image")
    assert torch.equal(image, joint) != has_text, "the modes differ only where text is joined"
    assert torch.equal(run(pipe, name), before)
    assert not denoiser._forward_hooks
    assert not denoiser._forward_hooks_with_kwargs


def test_a_layer_with_all_heads_perturbed_is_that_layer_with_attention_replaced_by_value() -> None:
    pipe = tiny.build("wan")
    layer = pipe.transformer.blocks[1].attn1
    arguments: list[Any] = []
    with attach(pipe, HeadHunter(["L1"])) as handle, watched(pipe, handle._roots[0]) as seen:
        hook = pipe.transformer.register_forward_pre_hook(
            lambda _m, _a, k: arguments.append(dict(k)), with_kwargs=True
        )
        run(pipe, "wan", guidance_scale=1.0)
        hook.remove()

    class Identity:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))

    layer.processor = Identity()
    with torch.no_grad():
        want = pipe.transformer(**arguments[0])[0]
    assert seen.passes[1][0] == "perturbed"
    torch.testing.assert_close(seen.passes[1][1], want, rtol=1e-5, atol=1e-6)


def test_a_sparse_plan_runs_on_the_other_heads_as_it_does_without_guidance() -> None:
    pipe = tiny.build("wan")
    plan = Plan((Rule(build("random", {"density": 0.5, "block_size": 8})),))
    with attach(pipe, plan, guidance=HeadHunter(["L0H1"]), backend="cpu") as handle:
        root = handle._roots[0]
        seen: list[tuple[SeamCall, torch.Tensor]] = []
        inner = root.attend

        def noted(site: Any, call: SeamCall) -> torch.Tensor:
            out = inner(site, call)
            if site.layer == 0:
                seen.append((call, out))
            return out

        root.attend = noted  # type: ignore[method-assign]
        run(pipe, "wan", guidance_scale=1.0)
        report = handle.report()
    (plain, sparse), (again, half) = seen[0], seen[1]
    assert torch.equal(plain.query, again.query), "the first site sees the same in both passes"
    assert torch.equal(half[:, :, 0], sparse[:, :, 0])
    assert torch.equal(half[:, :, 1], again.value[:, :, 1])
    assert report.density < 1


def test_rules_of_the_conditional_branch_hold_in_its_perturbed_pass() -> None:
    pipe = tiny.build("wan")
    sparse = build("random", {"density": 0.5, "block_size": 8})
    base = Plan((Rule(sparse, branch="cond"),))
    with attach(pipe, base, guidance=HeadHunter(["L0H1"]), backend="cpu") as handle:
        run(pipe, "wan", guidance_scale=4.0)
        first = handle.report().layers[0]
    assert (first.sparse, first.dense) == (4, 2), "two of three passes per step follow the rule"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_compiled_denoisers_are_guided_alike(name: str) -> None:
    pipe = tiny.build(name)
    with attach(pipe, HeadHunter(["L0H0"])):
        want = run(pipe, name)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with attach(pipe, HeadHunter(["L0H0"])) as handle:
        got = run(pipe, name)
        assert handle.report().guidance["extra_passes"] == 2  # type: ignore[index]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_fused_projections_are_guided_alike() -> None:
    pipe = tiny.build("flux")
    with attach(pipe, HeadHunter(["L0H0"])):
        want = run(pipe, "flux")
    pipe.transformer.fuse_qkv_projections()
    with attach(pipe, HeadHunter(["L0H0"])):
        torch.testing.assert_close(run(pipe, "flux"), want, rtol=1e-4, atol=1e-4)


def test_two_prompts_with_one_seed_are_not_taken_for_a_guided_batch() -> None:
    """PixArt keeps its guidance in a local variable; the two halves of the batch are equal here."""
    pipe = tiny.build("pixart")
    arguments = {**tiny.call_arguments("pixart"), "num_inference_steps": 1, "guidance_scale": 1.0}
    arguments["prompt"] = ["a red circle", "a blue square"]
    seeds = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)]
    with attach(pipe, HeadHunter(["L0H0"])) as handle:
        pipe(**arguments, generator=seeds)
        assert handle.report().guidance["extra_rows"] == 2  # type: ignore[index]


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": []}, "not empty"),
        ({"heads": "L1H2"}, "a list of heads"),
        ({"heads": ["H2L1"]}, "is no head"),
        ({"heads": [(0, -1)]}, "is no head"),
        ({"heads": ["L0H0"], "u": 1.5}, "at most 1"),
        ({"heads": ["L0H0"], "u": -0.1}, "at least 0"),
        ({"heads": ["L0H0"], "u": float("nan")}, "u is not usable"),
        ({"heads": ["L0H0"], "scale": float("inf")}, "finite"),
        ({"heads": ["L0H0"], "scale": "much"}, "scale is not usable"),
        ({"heads": ["L0H0"], "mode": "text"}, "'joint', 'image'"),
    ],
)
def test_bad_guidance_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        HeadHunter(**options)
    assert "\n" not in str(error.value)


def test_heads_have_one_spelling_and_come_once() -> None:
    assert HeadHunter(["l3h1", (3, 1), "L2"]).heads == ("L3H1", "L2")  # type: ignore[arg-type]
    assert HeadHunter(["L1", "L0H2"]).by_layer([3, 2], "M") == {0: (2,), 1: (0, 1)}  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["L9H0", "L0H7"])
def test_a_head_of_another_model_is_refused_before_anything_changes(head: str) -> None:
    pipe = tiny.build("wan")
    with pytest.raises(InputError, match="WanTransformer3DModel has no head"):
        attach(pipe, HeadHunter([head]))
    assert not pipe.transformer._forward_pre_hooks


def test_sd35_layers_are_blocks_and_leave_the_second_attention_alone() -> None:
    pipe = tiny.build("sd3")
    target = find_targets(pipe)[0]
    assert len(target.guided_paths) == len(pipe.transformer.transformer_blocks)
    assert len(target.paths) > len(target.guided_paths)


def test_guidance_given_twice_or_of_another_kind_is_refused() -> None:
    pipe = tiny.build("wan")
    with pytest.raises(InputError, match="given twice"):
        attach(pipe, HeadHunter(["L0"]), guidance=HeadHunter(["L0"]))
    with pytest.raises(InputError, match="expected a HeadHunter"):
        attach(pipe, "dense", guidance=["L0H0"])  # type: ignore[arg-type]


def test_a_step_cache_is_refused_when_attaching_and_when_it_comes_later() -> None:
    import diffusers

    pipe = tiny.build("wan")
    handle = attach(pipe, HeadHunter(["L0H0"]))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(UnsupportedCall, match="step cache"):
        run(pipe, "wan")
    handle.detach()
    with pytest.raises(AttachError, match="step cache"):
        attach(pipe, HeadHunter(["L0H0"]))


def test_a_guider_that_is_not_linear_is_refused() -> None:
    from diffusers.guiders import AdaptiveProjectedGuidance

    pipe = tiny.build("hunyuan_video15")
    pipe.guider = AdaptiveProjectedGuidance()
    with pytest.raises(AttachError, match="linearly"):
        attach(pipe, HeadHunter(["L0H0"]))


def test_a_pipeline_without_text_is_refused() -> None:
    stock = tiny.build("sd")

    class Unconditional:
        def __init__(self) -> None:
            self.components, self.scheduler = stock.components, stock.scheduler

        def __call__(self, batch_size: int = 1) -> None:
            raise AssertionError("not called")

    with pytest.raises(AttachError, match="takes no prompt"):
        attach(Unconditional(), HeadHunter(["L0H0"]))


def test_an_unconditional_pass_that_comes_first_is_refused() -> None:
    pipe = tiny.build("wan")
    inputs = torch.randn(1, 16, 3, 4, 6), torch.tensor([500]), torch.randn(1, 16, 32)
    with (
        attach(pipe, HeadHunter(["L0H0"])),
        pipe.transformer.cache_context("uncond"),
        torch.no_grad(),
        pytest.raises(UnsupportedCall, match="before the one with the prompt"),
    ):
        pipe.transformer(*inputs)


# ---- plan files -------------------------------------------------------------------------------


def test_a_plan_file_carries_guidance(tmp_path: Path) -> None:
    spec = HeadHunter(["L0H1", "L1H0"], scale=2.5, u=0.5, mode="image")
    path = Plan(guidance=spec).save(tmp_path / "plan.json")
    assert Plan.load(path).guidance == spec
    pipe = tiny.build("wan")
    with attach(pipe, path) as handle:
        run(pipe, "wan")
        found = handle.report().guidance
    assert found is not None
    assert (found["heads"], found["scale"], found["u"]) == (["L0H1", "L1H0"], 2.5, 0.5)
    plain = json.loads(Plan().save(tmp_path / "plain.json").read_text())
    assert "guidance" not in plain


@pytest.mark.parametrize(
    "part", [{"heads": ["L0H0"], "weight": 1}, {"scale": 1.0}, {"heads": ["x"]}, ["L0H0"], {}]
)
def test_a_malformed_guidance_section_is_refused(tmp_path: Path, part: Any) -> None:
    path = Plan(guidance=HeadHunter(["L0H0"])).save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["guidance"] = part
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="guidance"):
        Plan.load(path)


# ---- the search -------------------------------------------------------------------------------


def fake(value: Callable[[frozenset[str]], float], seen: list[frozenset[str]]) -> Any:
    def score(chosen: tuple[str, ...], candidates: Any) -> list[float]:
        sets = [frozenset((*chosen, head)) for head in candidates]
        seen.extend(sets)
        return [value(one) for one in sets]

    return score


HEADS = [f"L{layer}H{head}" for layer in (10, 2, 0, 1) for head in range(3)]


@pytest.mark.parametrize(("rounds", "top_k"), [(1, 4), (2, 3), (4, 1)])
def test_additive_scores_give_the_best_heads_in_groups(rounds: int, top_k: int) -> None:
    worth = {head: (7 * i) % 12 for i, head in enumerate(HEADS)}
    seen: list[frozenset[str]] = []
    found = greedy(HEADS, rounds, top_k, fake(lambda s: sum(worth[h] for h in s), seen))
    best = sorted(HEADS, key=lambda h: -worth[h])
    assert [one.chosen for one in found] == [
        tuple(best[i * top_k : (i + 1) * top_k]) for i in range(rounds)
    ]
    cost = Hunt(rounds, top_k).generations(len(HEADS), 5)
    assert cost == 5 * len(seen) == 5 * sum(12 - top_k * t for t in range(rounds))


def test_a_pair_that_only_works_together_needs_a_second_round() -> None:
    def value(heads: frozenset[str]) -> float:
        return 1.0 * ("L0H0" in heads) + 5.0 * ({"L0H0", "L2H2"} <= heads) - ("L2H2" in heads)

    once = greedy(HEADS, 1, 2, fake(value, []))
    twice = greedy(HEADS, 2, 1, fake(value, []))
    assert "L2H2" not in once[0].chosen
    assert [one.chosen for one in twice] == [("L0H0",), ("L2H2",)]


def test_ties_go_to_the_lower_layer_then_head() -> None:
    found = greedy(HEADS, 1, 5, fake(lambda _: 1.0, []))
    assert found[0].chosen == ("L0H0", "L0H1", "L0H2", "L1H0", "L1H1")


def test_a_pool_too_small_and_a_score_that_is_no_number_are_refused() -> None:
    with pytest.raises(InputError, match="at least 6 heads"):
        greedy(HEADS[:5], 2, 3, fake(lambda _: 1.0, []))
    with pytest.raises(InputError, match="not a number"):
        greedy(HEADS, 1, 1, fake(lambda _: float("nan"), []))


class Judge:
    """The brightest clip wins; counts its calls, and stops as if killed after so many."""

    def __init__(self, stop: int = 10**9) -> None:
        self.calls, self.stop = 0, stop

    def score(self, frames: Any, prompt: str) -> float:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return float(frames.mean()) + len(prompt) / 100


SIZE: dict[str, Any] = {"steps": 1, "frames": 5, "height": 32, "width": 32}


def hunted(pipe: Any, judge: Judge, work: Path | None) -> Any:
    scorer = Scorer("bright", "bright", judge.score)
    prompts = ["a red circle", "a blue square"]
    return search_guidance(pipe, prompts, scorer, rounds=2, top_k=1, work=work, **SIZE)


def test_a_killed_search_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    pipe = tiny.build("wan")
    whole = Judge()
    want = hunted(pipe, whole, None)
    cost = 2 * (4 + 3)  # prompts x (heads + heads left)
    assert want.generations == cost
    assert whole.calls == cost + 2, "and the two without guidance"
    with pytest.raises(KeyboardInterrupt):
        hunted(pipe, Judge(stop=5), tmp_path)
    rest = Judge()
    found = hunted(pipe, rest, tmp_path)
    assert rest.calls == cost + 2 - 5
    assert found.details == want.details
    assert found.plan.guidance == HeadHunter(want.heads)
    with attach(pipe, found.plan) as handle:
        run(pipe, "wan")
        assert handle.report().guidance["heads"] == list(want.heads)  # type: ignore[index]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    options = ["--objective", "guidance", "--model", "tiny/wan", "--prompts", str(prompts)]
    options += [part for name, n in SIZE.items() for part in (f"--{name}", str(n))]
    options += ["--top-k", "2", "--no-atlas"]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "dittools"]
    for name, start in (("one", ["dittools"]), ("two", launch)):
        out = tmp_path / name / "plan.json"
        out.parent.mkdir()
        command = [sys.executable, "-m", *start, "search", *options, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "guidance.json").read_bytes() for name in ("one", "two"))
    assert one == two


# ---- scorers, profile and command line --------------------------------------------------------


def test_margins_tell_apart_what_the_checker_calls_equal() -> None:
    prompt = "a red circle moving left over a blue background"
    frames, _ = draw([random_clip(parse(prompt), Random(0))], torch.arange(12)[None])
    clip = frames[0].permute(0, 2, 3, 1).numpy()
    good = prompt_margins(clip, prompt)
    assert good["all"] > 0.9
    assert prompt_margins(clip, prompt.replace("left", "right"))["motion"] == 0.0
    assert prompt_margins(clip[:6], prompt)["motion"] < good["motion"]
    assert prompt_margins(clip, "nothing known") == {"all": 0.0}


def test_profile_joins_cheapness_and_gain() -> None:
    atlas = {
        "heads": 2,
        "range_steps": [1, 3],
        "candidates": [{"density": 1.0}, {"density": 0.2}],
        "cells": [
            {"layer": layer, "head": head, "range": part, "class": "local", "error": [0.0, error]}
            for layer in (0, 1, 2)
            for head in (0, 1)
            for part, error in enumerate((0.5, 0.05 if head else 0.5))
        ],
    }
    gains = {"L0H0": 0.3, "L0H1": -0.1, "L1H0": 0.2, "L1H1": -0.2}
    found = profiles(atlas, gains, [0, 2])  # guidance's layer 1 is the atlas's layer 2
    assert [(p.head, p.density) for p in found] == [
        ("L0H0", 1.0),
        ("L0H1", pytest.approx(0.4)),
        ("L1H0", 1.0),
        ("L1H1", pytest.approx(0.4)),
    ]
    assert rank_correlation(found) == pytest.approx(0.894, abs=1e-3)
    page = guidance_page(DETAILS, found, "")
    assert "Rank correlation" in page
    assert page.count("<circle") == 4


DETAILS: dict[str, Any] = {
    "baseline": 0.5,
    "scorer": "demo",
    "generations": 4,
    "pairs": [["a", 0]],
    "pool": 4,
    "rounds": 1,
    "top_k": 1,
    "scale": 3.0,
    "u": 1.0,
    "mode": "joint",
    "found": [{"chosen": ["L0H0"], "scores": {"L0H0": 0.8}}],
}


@pytest.mark.parametrize(
    "name", ["pickscore=/nowhere", "clip", "no.such.module:score", "math:pi", "demo=x"]
)
def test_unknown_scorers_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        named_scorer(name)


def test_clip_and_pickscore_come_from_a_folder_of_the_user(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "red": 2, "<end>": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<end>", eos_token="<end>"
    ).save_pretrained(tmp_path)
    shared = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shared |= {"num_attention_heads": 2}
    text = {**shared, "vocab_size": 4, "eos_token_id": 3, "max_position_embeddings": 8}
    seen = {**shared, "patch_size": 32, "image_size": 224}
    config = transformers.CLIPConfig(text_config=text, vision_config=seen, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    frames = torch.rand(6, 32, 32, 3).numpy()
    cosine = named_scorer(f"clip={tmp_path}")(frames, "a red")
    pick = named_scorer(f"pickscore={tmp_path}")(frames, "a red")
    scale = float(model.logit_scale.exp())
    assert cosine == pytest.approx(max(100 * pick / scale, 0.0), abs=1e-3)
    assert 0 < abs(pick) <= scale


def test_heads_on_the_command_line(tmp_path: Path) -> None:
    assert guidance_of("L0H1,L3H2", 2.0, None) == HeadHunter(("L0H1", "L3H2"), scale=2.0)
    path = Plan(guidance=HeadHunter(("L0H0",), scale=8.0)).save(tmp_path / "p.json")
    assert guidance_of(str(path), None, 0.5) == HeadHunter(("L0H0",), scale=8.0, u=0.5)
    assert guidance_of(None, None, None) is None
    with pytest.raises(InputError, match="without heads"):
        guidance_of(None, 2.0, None)
    with pytest.raises(InputError, match="holds no guidance"):
        guidance_of(str(Plan().save(tmp_path / "q.json")), None, None)
