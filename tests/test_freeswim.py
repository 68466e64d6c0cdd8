"""FreeSwim: the inward window, two lanes with borrowed text attention, and the recipe around them.

The oracle is a loop over tokens that follows the paper: full lane first, then the window lane.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dittools
from dittools.cli import main
from dittools.errors import AttachError, DitToolsError, InputError
from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.methods.freeswim import FreeSwim, attention_cost, default_temperature
from dittools.methods.gna import GNA, gna_mask
from dittools.patches.families.wan import FAMILY as WAN
from dittools.patches.lanes import Lanes, LaneSettings
from dittools.pipelines import freeswim, tiny
from dittools.pipelines.refine import Refined, cache_bytes
from dittools.pipelines.tail import tail_of
from dittools.plans import Plan

PROMPT = "a red circle moving left"
GRIDS = [  # frames, height, width, half sides
    (2, 9, 11, 2, 3),
    (1, 12, 20, 3, 5),
    (3, 6, 10, 0, 1),
    (2, 4, 9, 3, 2),
    (2, 6, 5, 3, 2),
    (1, 4, 4, 4, 4),
    (2, 5, 7, 1, 8),
]


def run(pipe: Any, **changes: Any) -> Refined:
    """A small request, quick on every toy pipeline."""
    wanted: dict[str, Any] = {
        "height": 64, "width": 80, "native_height": 32, "native_width": 48, "frames": 5,
        "steps": 5, "guidance": 3.0, "max_sequence_length": 16, "note": lambda _: None,
    }  # fmt: skip
    return freeswim(pipe, PROMPT, **{**wanted, **changes})


def clip(frames: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return torch.rand(frames, height, width, 3).numpy()


def axis_by_definition(length: int, half: int) -> torch.Tensor:
    """Which positions of an axis each position sees, as the authors write it."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for y in range(length):
        after = half + max(half - y, 0)
        before = half + max(half + y - (length - 1), 0)
        for other in range(length):
            seen[y, other] = y - before <= other <= y + after
    return seen


def window_by_definition(grid: TokenGrid, half: tuple[int, int]) -> torch.Tensor:
    rows, columns = (axis_by_definition(n, d) for n, d in zip(grid.shape[1:], half, strict=True))
    place = grid.coordinates()
    return rows[place[:, 1][:, None], place[:, 1]] & columns[place[:, 2][:, None], place[:, 2]]


@pytest.mark.parametrize(("frames", "height", "width", "dh", "dw"), GRIDS)
def test_the_window_is_the_authors_and_gna_at_stride_one(
    frames: int, height: int, width: int, dh: int, dw: int
) -> None:
    grid = TokenGrid(frames, height, width)
    method = FreeSwim((2 * dh + 1, 2 * dw + 1), attn_temperature=1.0, block_size=16)
    mask = method.mask(grid)
    dense = mask.to_dense()[0]
    assert torch.equal(dense, window_by_definition(grid, (dh, dw)))
    gna = GNA(("full", 2 * dh + 1, 2 * dw + 1), stride=1, block_size=16)
    assert torch.equal(dense, gna_mask(grid, gna).to_dense()[0])
    if dh and dw:  # an even native side gives the same window as the odd one above
        even = FreeSwim((2 * dh, 2 * dw), attn_temperature=1.0, block_size=16)
        assert torch.equal(dense, even.mask(grid).to_dense()[0])
    keys = frames * min(2 * dh + 1, height) * min(2 * dw + 1, width)
    assert set(dense.sum(1).tolist()) == {keys}
    assert mask.density == pytest.approx(keys / grid.tokens)
    shape = (*grid.shape, *grid.shape)
    for axis in (1, 2):
        flipped = dense.view(shape).flip(axis, axis + 3).reshape(dense.shape)
        assert torch.equal(dense, flipped)
    covers = height <= 2 * dh + 1 and width <= 2 * dw + 1
    assert bool(dense.all()) == covers


def test_published_numbers_of_window_temperature_cost_and_memory() -> None:
    assert [len(set(g)) > 0 for g in GRIDS[:3]]
    keys = [70, 77, 9]
    shares = [0.3535, 0.3208, 0.05]
    for (frames, height, width, dh, dw), count, share in zip(GRIDS, keys, shares, strict=False):
        mask = FreeSwim((2 * dh + 1, 2 * dw + 1), 1.0).mask(TokenGrid(frames, height, width))
        assert int(mask.to_dense()[0, 0].sum()) == count
        assert mask.density == pytest.approx(share, abs=5e-5)
    assert FreeSwim((30, 52)).window == (31, 53)
    assert default_temperature(30, 52) == pytest.approx(1.046076, abs=1e-6)
    assert FreeSwim().temperature == default_temperature(30, 52)
    cases = [
        ((68, 120), (30, 52), (0.83, 1.43, 2.22, 3.32)),
        ((120, 212), (45, 80), (0.88, 1.55, 2.54, 4.11)),
        ((135, 240), (45, 80), (0.90, 1.63, 2.76, 4.71)),
    ]
    for (height, width), native, speedups in cases:
        grid = TokenGrid(21, height, width)
        for interval, speedup in zip((None, 1, 2, 5), speedups, strict=True):
            assert 1 / attention_cost(grid, native, interval) == pytest.approx(speedup, abs=6e-3)
    assert cache_bytes(30, 171_360, 1536, torch.bfloat16) == pytest.approx(15.8e9, rel=1e-3)
    assert cache_bytes(40, 680_400, 5120, torch.bfloat16) == pytest.approx(278.7e9, rel=1e-3)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"native": (0, 4)}, "native is not usable.*two whole numbers"),
        ({"native": (4,)}, "two whole numbers"),
        ({"native": 4}, "two whole numbers"),
        ({"native": (1, 1)}, "log 1 is 0"),
        ({"attn_temperature": 0.0}, "a number above 0"),
        ({"attn_temperature": float("nan")}, "a number above 0"),
        ({"attn_temperature": True}, "a number or nothing"),
    ],
)
def test_unusable_parameters_are_one_clear_error(params: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        build("freeswim", params)


def test_the_scale_is_exact_and_the_window_is_never_traded_for_speed() -> None:
    """On a toy grid dense attention is faster, and still the window runs."""
    grid = TokenGrid(2, 6, 8)
    q, k, v = (torch.randn(1, grid.total, 2, 8) for _ in range(3))
    method = FreeSwim((2, 3), attn_temperature=1.25)
    out = dittools.attention(q, k, v, grid=grid, method=method)
    allowed = window_by_definition(grid, (1, 1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (1.25 / math.sqrt(8))
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, v))
    pipe = tiny.build("wan")
    with dittools.attach(pipe, FreeSwim((1, 2))) as handle:
        pipe(**{**tiny.call_arguments("wan"), "num_inference_steps": 1})
        report = handle.report()
    assert report.calls["sparse"] == 4
    assert report.fallbacks == {}


def test_a_window_over_everything_at_temperature_one_is_stock_attention_bit_for_bit() -> None:
    pipe = tiny.build("wan")
    call = tiny.call_arguments("wan")
    stock = pipe(**call, generator=torch.Generator().manual_seed(1)).frames
    with dittools.attach(pipe, FreeSwim((9, 9), attn_temperature=1.0)):
        same = pipe(**call, generator=torch.Generator().manual_seed(1)).frames
    assert torch.equal(stock, same)
    with dittools.attach(pipe, FreeSwim((9, 9), attn_temperature=1.5)):
        other = pipe(**call, generator=torch.Generator().manual_seed(1)).frames
    assert not torch.equal(stock, other)


# --- the lanes beside a loop over tokens -----------------------------------------------------


class Bare:
    """As much of a pipeline as lanes ask for: a denoiser and a scheduler that counts steps."""

    def __init__(self, transformer: torch.nn.Module, steps: int) -> None:
        self.components = {"transformer": transformer}
        self.scheduler = type("Scheduler", (), {})()
        self.scheduler.timesteps = torch.arange(steps, 0, -1)
        self.scheduler._step_index, self.scheduler._begin_index = 0, None


def wan_of(image: bool) -> Any:
    from diffusers import WanTransformer3DModel

    extra = {"image_dim": 12, "added_kv_proj_dim": 16} if image else {}
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, text_dim=12, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        rope_max_seq_len=32, **extra,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, factor: float
) -> torch.Tensor:
    """Attention of [S, H, D], one query and head at a time."""
    out = torch.zeros_like(q)
    for token in range(q.shape[0]):
        keys, values = k[allowed[token]], v[allowed[token]]
        for head in range(q.shape[1]):
            scores = keys[:, head] @ q[token, head] * (factor / math.sqrt(q.shape[2]))
            out[token, head] = scores.softmax(0) @ values[:, head]
    return out


def project(attn: Any, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context))
    return tuple(t.unflatten(1, (attn.heads, -1)) for t in (q, k, attn.to_v(context)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd, c, s = x[..., 0::2], x[..., 1::2], cos[0, ..., 0::2], sin[0, ..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)


def naive_lane(
    model: Any,
    inputs: dict[str, torch.Tensor],
    allowed: torch.Tensor,
    factor: float,
    borrowed: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the prediction of one lane and its raw text attention, block by block."""
    x = inputs["hidden_states"]
    grid = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
    cos, sin = model.rope(x)
    image = inputs.get("encoder_hidden_states_image")
    temb, time, text, image = model.condition_embedder(
        inputs["timestep"], inputs["encoder_hidden_states"], image
    )
    h = model.patch_embedding(x).flatten(2).transpose(1, 2)[0]
    kept = []
    for number, block in enumerate(model.blocks):
        parts = (block.scale_shift_table + time.unflatten(1, (6, -1)))[0]
        shift, scale, gate, shift2, scale2, gate2 = parts
        norm = block.norm1(h) * (1 + scale) + shift
        q, k, v = project(block.attn1, norm, norm)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = h + block.attn1.to_out[0](one_by_one(q, k, v, allowed, factor).flatten(1)) * gate
        attn = block.attn2
        q, k, v = project(attn, block.norm2(h), text[0])
        every = torch.ones(len(q), len(k), dtype=torch.bool)
        own = one_by_one(q, k, v, every, 1.0)
        kept.append(own)
        taken = (own if borrowed is None else borrowed[number]).flatten(1)
        if image is not None:
            k = attn.norm_added_k(attn.add_k_proj(image[0])).unflatten(1, (attn.heads, -1))
            v = attn.add_v_proj(image[0]).unflatten(1, (attn.heads, -1))
            every = torch.ones(len(q), len(k), dtype=torch.bool)
            taken = taken + one_by_one(q, k, v, every, 1.0).flatten(1)
        h = h + attn.to_out[0](taken)
        h = h + block.ffn(block.norm3(h) * (1 + scale2) + shift2) * gate2
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1))[0]
    out = model.proj_out(model.norm_out(h) * (1 + scale) + shift)
    out = out.view(*grid, 1, 2, 2, -1).permute(6, 0, 3, 1, 4, 2, 5)
    return out.reshape(1, -1, *x.shape[2:]), kept


@pytest.mark.parametrize(
    ("interval", "image"), [(None, False), (1, False), (2, False), (2, True), (None, True)]
)
def test_lanes_equal_two_passes_of_a_loop_over_tokens(interval: int | None, image: bool) -> None:
    """Every prediction of three guided steps: refreshed, stale, and without the prompt."""
    steps, factor = 3, 1.2
    model, grid = wan_of(image), TokenGrid(2, 6, 8)
    allowed = window_by_definition(grid, (2, 2))
    every = torch.ones_like(allowed)
    text = 512 if image else 7  # diffusers counts the image's tokens off 512 of text
    prompts = {name: torch.randn(1, text, 12) for name in ("cond", "uncond")}
    window = FreeSwim((4, 4), attn_temperature=1.0, block_size=16)
    bare = Bare(model, steps)
    borrowed: list[torch.Tensor] = []
    with Lanes(bare, LaneSettings(window, Plan(), factor, interval)) as lanes:
        for step in range(steps):
            bare.scheduler._step_index = step
            x = torch.randn(1, 4, 2, 12, 16)
            for branch, prompt in prompts.items():
                inputs = {"hidden_states": x, "timestep": torch.tensor([900 - 100 * step])}
                inputs["encoder_hidden_states"] = prompt
                if image:
                    inputs["encoder_hidden_states_image"] = torch.randn(1, 5, 12)
                with model.cache_context(branch):
                    found = model(**inputs, return_dict=False)[0]
                refresh = interval is None or (branch == "cond" and step % interval == 0)
                if refresh:
                    borrowed = naive_lane(model, inputs, every, factor, None)[1]
                has_none = interval is not None and branch == "uncond"
                take = None if has_none else borrowed
                want, _ = naive_lane(model, inputs, allowed, factor, take)
                torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)
                if refresh and step == 0:  # the window lane's own text attention would show
                    own, _ = naive_lane(model, inputs, allowed, factor, None)
                    assert (own - want).abs().max() > 1e-4
        reports, refreshes = lanes.reports(), lanes.refreshes
    passes = 2 * steps if interval is None else -(-steps // interval)
    assert reports["full"].calls["dense"] == 2 * passes  # two blocks
    assert refreshes == list(range(0, steps, interval or 1))
    assert reports["window"].calls["sparse"] == 2 * 2 * steps


def test_a_full_lane_forced_to_the_window_changes_nothing() -> None:
    """Both lanes then see the same, so lending text attention is lending one's own."""
    video = clip(5, 32, 48)
    pipe = tiny.build("wan")
    window = FreeSwim((2, 3), attn_temperature=1.0)
    alone = run(pipe, video=video, mode="window")
    for interval in (None, 1):
        forced = run(pipe, video=video, plan=window, cache_interval=interval)
        np.testing.assert_array_equal(forced.frames, alone.frames)
    real = run(pipe, video=video, cache_interval=1)
    assert float(np.abs(real.frames - alone.frames).max()) > 1e-4


def predictions(pipe: Any, **changes: Any) -> list[tuple[str, torch.Size, torch.Tensor]]:
    """Return (lane, input shape, output) of every forward at the target size."""
    seen: list[tuple[str, torch.Size, torch.Tensor]] = []

    def note(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        shape = kwargs["hidden_states"].shape
        seen.append(("", shape, out[0].clone()))

    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    try:
        run(pipe, **changes)
    finally:
        handle.remove()
    return seen


def test_refreshing_every_step_equals_no_cache_where_the_prompt_is() -> None:
    """Forwards without a cache: full, window with the prompt; full, window without it."""
    pipe, video = tiny.build("wan"), clip(5, 32, 48)
    uncached = predictions(pipe, video=video, cache_interval=None, guidance=3.0)
    cached = predictions(pipe, video=video, cache_interval=1, guidance=3.0)
    assert len(uncached) == 3 * 4  # 5 steps at strength 0.7 leave 3
    assert len(cached) == 3 * 3
    for k in range(2):  # of the first step; later ones start from other latents
        assert torch.equal(uncached[k][2], cached[k][2])
    assert not torch.equal(uncached[3][2], cached[2][2])
    sparse = predictions(pipe, video=video, cache_interval=3, guidance=3.0)
    assert len(sparse) == 3 * 2 + 1
    assert {shape[0] for _, shape, _ in uncached + cached + sparse} == {1}


def test_a_batched_pipeline_lends_only_to_the_row_with_the_prompt() -> None:
    """LTX guides in one batch: its rows must equal the runs of either prompt alone."""
    pipe, video = tiny.build("ltx"), clip(9, 32, 64)
    sizes: dict[str, Any] = {
        "video": video,
        "height": 64,
        "width": 96,
        "frames": 9,
        "strength": 0.4,
    }
    guided = predictions(pipe, **sizes, cache_interval=1, negative_prompt="a blue square")
    assert [shape[0] for _, shape, _ in guided] == [1, 2, 1, 2]  # full lane, then both rows
    alone = predictions(pipe, **sizes, cache_interval=1, guidance=1.0)
    torch.testing.assert_close(guided[0][2], alone[0][2])
    torch.testing.assert_close(guided[1][2][1:], alone[1][2], atol=1e-5, rtol=1e-4)
    window = predictions(pipe, **sizes, mode="window", negative_prompt="a blue square")
    torch.testing.assert_close(guided[1][2][:1], window[0][2][:1], atol=1e-5, rtol=1e-4)
    assert (guided[1][2][1] - window[0][2][1]).abs().max() > 1e-5
    both = predictions(pipe, **sizes, cache_interval=None, negative_prompt="a blue square")
    assert [shape[0] for _, shape, _ in both] == [2, 2, 2, 2]


# --- the recipe ------------------------------------------------------------------------------


def unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_without_a_window_the_second_stage_is_the_stock_video_to_video_pipeline(
    scheduler: str,
) -> None:
    from diffusers import WanVideoToVideoPipeline

    pipe, video = tiny.build("wan"), clip(5, 64, 80)
    if scheduler == "unipc":
        pipe.scheduler = unipc()
    options = {"steps": 6, "strength": 0.7, "video": video, "attn_temperature": 1.0}
    ours = run(
        pipe, **options, native_height=64, native_width=80, mode="window", flow_shift=5.0,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    parts = {n: pipe.components[n] for n in ("tokenizer", "text_encoder", "transformer", "vae")}
    name = "flow_shift" if scheduler == "unipc" else "shift"
    shifted = type(pipe.scheduler).from_config(pipe.scheduler.config, **{name: 5.0})
    stock = WanVideoToVideoPipeline(**parts, scheduler=shifted)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        video=torch.from_numpy(video).permute(0, 3, 1, 2)[None],
        prompt=PROMPT, height=64, width=80, num_inference_steps=6, strength=0.7,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(3), max_sequence_length=16,
    ).frames[0]  # fmt: skip
    np.testing.assert_allclose(ours.frames, theirs, atol=2e-5)


def test_fifty_steps_at_the_published_strength() -> None:
    pipe = tiny.build("wan")
    for scheduler in (pipe.scheduler, unipc()):
        whole = type(scheduler).from_config(scheduler.config)
        whole.set_timesteps(50)
        twin, first = tail_of(scheduler, 50, 0.7, None)
        twin.set_timesteps(50)
        assert (first, len(twin.timesteps)) == (15, 35)
        assert torch.equal(twin.timesteps, whole.timesteps[15:])
        assert torch.equal(twin.sigmas, whole.sigmas[15:])
    small = {"height": 32, "width": 32, "native_height": 16, "native_width": 16, "frames": 1}
    options = {**small, "steps": 50, "guidance": 1.0, "video": clip(1, 16, 16)}
    five = run(pipe, **options, cache_interval=5).report
    assert five["refresh_steps"] == [0, 5, 10, 15, 20, 25, 30]
    assert (five["first_step"], five["steps"]) == (15, 35)
    assert five["lanes"]["full"]["calls"]["dense"] == 7 * 2
    assert len(run(pipe, **options, cache_interval=2).report["refresh_steps"]) == 18


def test_sizes_that_do_not_divide_are_padded_by_their_edge_and_cut() -> None:
    pipe, video = tiny.build("wan"), clip(5, 32, 48)
    odd = run(pipe, video=video, height=57, width=70, mode="window")
    assert odd.frames.shape == (5, 57, 70, 3)
    assert odd.report["padded"] == [64, 80]
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(video).permute(0, 3, 1, 2), (57, 70), mode="bilinear"
    )
    edged = torch.nn.functional.pad(enlarged, (0, 10, 0, 7), mode="replicate")
    padded = run(
        pipe, video=edged.permute(0, 2, 3, 1), native_height=32, native_width=48, mode="window"
    )
    np.testing.assert_allclose(odd.frames, padded.frames[:, :57, :70], atol=1e-5)


def test_two_denoisers_refresh_where_one_takes_over_and_memory_is_foretold() -> None:
    pipe = tiny.build("wan22")
    told: list[str] = []
    made = run(pipe, video=clip(5, 32, 48), cache_interval=9, note=told.append, steps=8)
    assert len(made.report["refresh_steps"]) == 2
    assert made.report["refresh_steps"][0] == 0
    width, tokens = 2 * 12, 2 * 4 * 5
    assert made.report["cache_bytes"] == cache_bytes(2, tokens, width, torch.float32)
    assert made.report["cache_peak_bytes"] == made.report["cache_bytes"]
    assert len(told) == 1
    assert "text cache" in told[0]
    elsewhere = run(pipe, video=clip(5, 32, 48), cache_device="cpu", cache_interval=None)
    assert elsewhere.report["cache_peak_bytes"] == made.report["cache_bytes"]


def test_one_seed_gives_one_clip_also_when_the_first_stage_is_handed_over() -> None:
    pipe = tiny.build("wan")
    whole = run(pipe, seed=5)
    assert whole.native.shape == (5, 32, 48, 3)
    again = run(pipe, seed=5, video=whole.native)
    np.testing.assert_array_equal(whole.frames, again.frames)
    assert not np.array_equal(whole.frames, run(pipe, seed=6, video=whole.native).frames)


def test_a_sparse_plan_runs_in_the_full_lane_at_the_same_temperature() -> None:
    pipe, video = tiny.build("wan"), clip(5, 32, 48)
    plan = Plan.of(build("random", {"density": 0.5, "block_size": 8}))
    made = run(pipe, video=video, plan=plan, backend="reference")
    assert made.report["lanes"]["full"]["calls"]["sparse"] > 0
    assert made.report["lanes"]["full"]["density"] < 0.7
    assert made.report["attention_cost"] is None  # nothing is known of other plans
    full = run(pipe, video=video, plan="dense")
    np.testing.assert_array_equal(full.frames, run(pipe, video=video).frames)


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan_video"])
def test_joint_streams_run_the_window_alone(name: str) -> None:
    pipe = tiny.build(name)
    call = tiny.call_arguments(name)
    extra = {"prompt_template": call["prompt_template"]} if "prompt_template" in call else {}
    options: dict[str, Any] = {**extra, "frames": 9, "steps": 3, "video": clip(9, 32, 48)}
    made = run(pipe, **options, mode="window", width=96)
    assert made.frames.shape == (9, 64, 96, 3)
    assert made.report["lanes"]["window"]["calls"]["sparse"] > 0
    with pytest.raises(InputError, match=r"no cross-attention to the text.*mode='window'"):
        run(pipe, **options)


# --- leaving everything as it was ------------------------------------------------------------


def state_of(pipe: Any) -> list[Any]:
    """What could be left behind: hooks, attributes and processor classes of every module."""
    modules = list(pipe.transformer.modules())
    return [
        id(pipe.scheduler),
        dict(pipe.scheduler.config),
        sorted(vars(pipe)),
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        [sorted(vars(m)) for m in modules],
        [type(m.processor) for m in modules if hasattr(m, "processor")],
    ]


@pytest.mark.parametrize("when", ["first stage", "full lane", "window lane", "before"])
def test_everything_is_restored_after_an_error_anywhere(when: str) -> None:
    pipe = tiny.build("wan")
    pipe(**{**tiny.call_arguments("wan"), "num_inference_steps": 1})  # leaves attributes of its own
    before = state_of(pipe)
    forwards = 0
    fails_at = {"first stage": 3, "full lane": 11, "window lane": 12, "before": 0}[when]

    class Broken(Exception):
        pass

    def fail(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == fails_at:
            raise Broken

    def say(_: str) -> None:
        if when == "before":
            raise Broken

    handle = pipe.transformer.blocks[1].register_forward_hook(fail)
    try:
        with pytest.raises(Broken):
            run(pipe, note=say)
    finally:
        handle.remove()
    assert state_of(pipe) == before
    run(pipe)
    assert state_of(pipe) == before


def caching(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"height": 16}, "height is below the native size.*at least 32 pixels; got 16"),
        ({"width": 32.5}, "width is below the native size"),
        ({"cache_interval": 0}, "cache_interval is not usable.*at least 1.*got 0"),
        ({"cache_interval": 1.5}, "cache_interval is not usable"),
        ({"strength": 0}, r"strength is not usable; expected in \(0, 1\]; got 0"),
        ({"strength": 1.1}, "strength is not usable"),
        ({"strength": float("nan")}, "strength is not usable"),
        ({"strength": 0.1}, "strength leaves no step to run; expected at least 0.2 for 5 steps"),
        ({"mode": "both"}, "unknown mode; expected override or window; got 'both'"),
        ({"mode": "window", "plan": "gna"}, "a plan is for the second lane"),
        ({"num_videos_per_prompt": 2}, "one clip at a time"),
        ({"latents": torch.zeros(1)}, "FreeSwim sets latents itself"),
        ({"video": np.zeros((4, 4), np.float32)}, r"video is not usable.*got \(4, 4\)"),
        ({"attn_temperature": -1.0}, "attn_temperature is not usable"),
        ({"plan": "no such"}, "not a plan|unknown|no plan"),
        ({"sharpness": 3}, "takes no sharpness"),
        ({"height": 4096}, "height is too large for this model; expected at most 512"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_runs(
    changes: dict[str, Any], text: str
) -> None:
    pipe = tiny.build("wan")
    before = state_of(pipe)
    with pytest.raises(DitToolsError, match=text) as caught:
        run(pipe, **changes)
    assert "\n" not in str(caught.value)
    assert state_of(pipe) == before


def test_what_does_not_compose_is_refused_with_a_sentence() -> None:
    pipe = tiny.build("wan")
    with pytest.raises(InputError, match=r"one clip at a time.*a string; got list"):
        freeswim(pipe, [PROMPT, PROMPT], height=64, width=64)  # type: ignore[arg-type]
    with dittools.attach(pipe, "gna"), pytest.raises(AttachError, match="plan is attached"):
        run(pipe)
    caching(pipe)
    with pytest.raises(InputError, match=r"step cache.*disable_cache\(\)"):
        run(pipe)
    with pytest.raises(InputError, match="nobody wrote down how AllegroPipeline encodes"):
        run(tiny.build("allegro"))
    with pytest.raises(AttachError):
        freeswim(object(), PROMPT, height=64, width=64)


def test_a_block_whose_text_attention_never_comes_by_is_named() -> None:
    """As in a compiled model: nothing is refined without its override in silence."""
    pipe = tiny.build("wan")
    stock = pipe.transformer.blocks[1].forward
    pipe.transformer.blocks[1].forward = lambda hidden, *_: hidden
    try:
        with pytest.raises(InputError, match=r"1 blocks never came by.*blocks\.1\.attn2"):
            run(pipe)
    finally:
        pipe.transformer.blocks[1].forward = stock


def test_facts_of_wan() -> None:
    pipe = tiny.build("wan")
    facts = WAN.refining
    assert facts is not None
    assert (facts.native(pipe), facts.token(pipe), facts.multiple(pipe)) == ((480, 832), 16, 16)
    with pytest.raises(InputError, match="at least 480 pixels"):
        freeswim(pipe, PROMPT, height=64, width=80)
    demo: Callable[..., Any] = dittools.pipelines.load
    loaded = demo("demo")
    with pytest.raises(InputError, match="at least 96 pixels"):
        freeswim(loaded, PROMPT, height=64, width=80)


# --- the command -----------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["freeswim", "--model", "tiny/wan", "--prompt", PROMPT, *options])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_writes_a_clip_of_the_size_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--height", "50", "--width", "60", "--frames", "1", "--steps", "3")
    code, out, err = command(capsys, *sizes, "--out", str(tmp_path), "--json")
    report = json.loads(out)
    assert (code, report["target"], report["padded"]) == (0, [50, 60], [64, 64])
    assert report["native"] == [32, 48]  # the toy's own size
    assert "FreeSwim override: 50x60 pixels" in err
    from PIL import Image

    assert Image.open(tmp_path / "clip.png").size[0] % 60 == 0  # enlarged by a whole factor
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--height", "16", "--width", "48", "--out", str(tmp_path))
    code, out, err = command(capsys, *small)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "below the native size" in err
    code, _, err = command(capsys, "--height", "64", "--width", "64", "--cache-interval", "0")
    assert code == 2
    assert "cache_interval is not usable" in err
