"""Every model family at toy size: exact when dense, text where it should be, padding unread."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from toys import OLD, Spy, Whole, build_toy
from toys import shared as pipeline

from dittools.errors import AttachError, InputError
from dittools.methods import build
from dittools.patches import Family, Layout, attach, families, register_family
from dittools.patches.adapters import _FAMILIES, argument, latent_video
from dittools.patches.families import flux, qwen_image
from dittools.pipelines import tiny


class Facts(NamedTuple):
    """What a short call of a toy pipeline must show."""

    grids: list[str]
    branches: list[str]
    calls: int  # eligible attention calls of 2 steps
    steps: int = 2


FACTS = {
    "wan": Facts(["3x2x3"], ["cond", "uncond"], 8),
    "wan22": Facts(["3x2x3"], ["cond", "uncond"], 8),
    "wan_vace": Facts(["3x2x3"], ["cond", "uncond"], 20),
    "ltx": Facts(["3x8x16"], ["cond_uncond"], 4),
    "ltx2": Facts(["3x16x16"], ["cond_uncond", "uncond_modality", "uncond_stg"], 12),
    "cogvideox": Facts(["3x2x3 + 16 text"], ["cond_uncond"], 4),
    "hunyuan_video": Facts(["3x4x6 + 16 text"], ["cond"], 4),
    "hunyuan_video15": Facts(["5x4x6 + 761 text"], ["cond", "uncond"], 8),
    "mochi": Facts(["2x4x6 + 1 text", "2x4x6 + 6 text"], ["cond_uncond"], 8),
    "allegro": Facts(["2x4x4"], [""], 4),
    "flux": Facts(["1x8x12 + 16 text"], ["cond"], 4),
    "flux2": Facts(["1x8x12 + 16 text"], ["cond", "uncond"], 8),
    "qwen_image": Facts(["1x4x6 + 3 text", "1x4x6 + 5 text"], ["cond", "uncond"], 8),
    "sd3": Facts(["1x16x24", "1x16x24 + 32 text"], [""], 6),
    "pixart": Facts(["1x4x6"], [""], 4),
    "cosmos": Facts(["1x4x6"], ["cond", "uncond"], 8),
    "auraflow": Facts(["1x8x12 + 24 text"], [""], 4),
    "z_image": Facts(["1x8x12 + 32 text"], [""], 4),
    "lumina2": Facts(["1x4x6 + 1 text", "1x4x6 + 11 text"], ["cond", "uncond"], 8),
    "sd": Facts(["1x16x24", "1x8x12"], [""], 21, 3),  # PNDM evaluates once more
    "sdxl": Facts(["1x8x12"], [""], 16),
}
# larger where the stock toy size leaves too few tokens for two blocks
SIZES: dict[str, dict[str, int]] = {
    "mochi": {"height": 64, "width": 96},
    "allegro": {"height": 64, "width": 64},
}
NAMES = sorted(FACTS)


def run(name: str, *, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Latents after two steps."""
    arguments = {**tiny.call_arguments(name), "output_type": "latent", "num_inference_steps": 2}
    arguments |= {**SIZES.get(name, {}), **changes}
    made = pipeline(name)(**arguments, generator=torch.Generator().manual_seed(seed))
    latents: torch.Tensor = made.frames if hasattr(made, "frames") else made.images
    return latents


@cache
def stock(name: str) -> torch.Tensor:
    return run(name)


def test_every_toy_pipeline_is_checked() -> None:
    assert set(tiny.TINY) == {*FACTS, "sana"}


def facts_of(name: str) -> Facts:
    """What the installed diffusers shows: LTX-2 had its extra guidance off by default once."""
    facts = FACTS[name]
    if name == "ltx2":
        default = signature(type(pipeline(name)).__call__).parameters["stg_scale"].default
        if default == 0:
            return facts._replace(branches=["cond_uncond"], calls=4)
    return facts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cell("attach, dense plan: bit-equal")
@pytest.mark.cell("detach: bit-equal")
def test_dense_and_detached_are_bit_equal(name: str) -> None:
    expected = stock(name)
    with attach(pipeline(name), "dense") as handle:
        assert torch.equal(run(name), expected)
        report = handle.report()
    assert torch.equal(run(name), expected)
    facts = facts_of(name)
    assert report.grids == facts.grids
    assert report.branches == facts.branches
    assert report.calls == {"sparse": 0, "dense": facts.calls, "passed_through": 0}
    assert report.steps == facts.steps
    assert (report.fallbacks, report.coverage["never_fired"]) == ({}, {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cell("sparse path at density 1")
def test_density_one_equals_dense(name: str) -> None:
    with attach(pipeline(name), Whole(), backend="reference") as handle:
        worst = (run(name) - stock(name)).abs().max()
        assert worst <= 1e-4 * stock(name).abs().max()  # sdxl latents reach 15
        report = handle.report()
    assert report.calls["sparse"] == facts_of(name).calls
    assert report.density == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_returns_reaches_the_picture(name: str) -> None:
    method = build("random", {"density": 0.3, "block_size": 8})
    with attach(pipeline(name), method, backend="cpu") as handle:
        assert not torch.equal(run(name), stock(name))
        assert handle.report().calls["sparse"] == facts_of(name).calls


# rows of V at the first site that depend on the noise; Z-Image mixes image padding in before
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("z_image", "sd", "sdxl")])
def test_the_grid_is_where_the_noise_is(name: str) -> None:
    spies = [Spy(), Spy()]
    for seed, spy in enumerate(spies):
        with attach(pipeline(name), spy):
            run(name, seed=seed)
    one, two = (next(c for c in spy.seen if c.layer == 0) for spy in spies)
    differs = (one.value != two.value).any(dim=3).any(dim=2)[0]
    grid = one.grid
    expected = torch.zeros(grid.total, dtype=torch.bool)
    expected[grid.text_before : grid.text_before + grid.tokens] = True
    assert torch.equal(differs, expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_unet_is_placed_at_each_resolution_in_execution_order(name: str) -> None:
    spy = Spy()
    with attach(pipeline(name), spy) as handle:
        run(name, num_inference_steps=1)
        sites = [layer.site for layer in handle.report().layers]
    first = [c.layer for c in spy.seen if c.step == 0]
    assert first == list(range(len(sites)))
    assert [s.split(".")[1].split("_")[0] for s in sites] == sorted(
        (s.split(".")[1].split("_")[0] for s in sites), key=["down", "mid", "up"].index
    )
    assert all(c.grid.total == c.query.shape[1] for c in spy.seen)


TWO = ["a red circle moving left over a plain background", "a"]


@pytest.mark.parametrize("name", ["hunyuan_video", "lumina2", "mochi", "qwen_image", "z_image"])
@pytest.mark.cell("batches, several outputs per prompt")
def test_rows_with_prompts_of_different_length_equal_dense(name: str) -> None:
    changes: dict[str, Any] = {"prompt": TWO}
    if name == "qwen_image":
        changes["negative_prompt"] = ["a blue square", "a"]
    expected = run(name, **changes)
    with attach(pipeline(name), "dense"):
        assert torch.equal(run(name, **changes), expected)
    with attach(pipeline(name), Whole(), backend="reference") as handle:
        torch.testing.assert_close(run(name, **changes), expected, atol=1e-4, rtol=1e-4)
        report = handle.report()
    assert report.fallbacks == {}
    # Mochi and Lumina2 run such rows one by one
    apart = {"lumina2": 12, "mochi": 16}  # the empty negative prompts of Lumina2 are alike
    assert report.calls["sparse"] == apart.get(name, facts_of(name).calls)


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15", "qwen_image"])
def test_padded_prompt_tokens_are_masked_out(name: str) -> None:
    spy = Spy()
    changes = {"prompt": TWO, "negative_prompt": TWO[::-1]} if name == "qwen_image" else {}
    with attach(pipeline(name), spy):
        run(name, num_inference_steps=1, **changes)
    call = spy.seen[0]
    if OLD and name == "qwen_image" and call.key_mask is None:
        pytest.skip("this diffusers lets Qwen-Image attend to padded prompt tokens")
    assert call.key_mask is not None
    text = call.grid.text_before
    assert call.key_mask[:, text : text + call.grid.tokens].all()
    dropped = (~call.key_mask).sum(dim=1)
    assert dropped.max() > 0
    assert dropped.max() < call.grid.text


def test_the_second_attention_of_sd35_medium_sees_the_image_alone() -> None:
    spy = Spy()
    with attach(pipeline("sd3"), spy) as handle:
        run("sd3", num_inference_steps=1)
        sites = [layer.site.removeprefix("transformer.") for layer in handle.report().layers]
    assert sites == [f"transformer_blocks.{p}" for p in ("0.attn", "0.attn2", "1.attn")]
    assert [c.grid.text for c in spy.seen] == [32, 0, 32]


@pytest.mark.cell(
    "attach, dense plan: bit-equal",
    family="sana",
    note="refused: linear self-attention has no query-key pairs to drop",
)
def test_sana_says_what_it_cannot_do() -> None:
    with pytest.raises(AttachError, match="linear"):
        attach(pipeline("sana"), "dense")


def test_reference_images_of_flux_stand_behind_the_image() -> None:
    def ids(number: int, height: int, width: int) -> torch.Tensor:
        rows = torch.cartesian_prod(torch.tensor([number]), torch.arange(height))
        return torch.tensor([(*r.tolist(), w) for r in rows for w in range(width)])

    both = torch.cat((ids(0, 4, 6), ids(1, 2, 3)))
    assert flux.image_size(both) == (4, 6, 6)
    arguments = {"img_ids": both, "encoder_hidden_states": torch.zeros(1, 5, 8)}
    (grid,) = flux.layout(arguments, torch.nn.Identity()).grids
    assert (grid.shape, grid.text_before, grid.text_after) == ((1, 4, 6), 5, 6)
    with pytest.raises(AttachError, match="raster"):
        flux.image_size(both[:-9])


def test_images_to_edit_of_qwen_stand_behind_the_image() -> None:
    arguments = {
        "img_shapes": [[(1, 4, 6), (1, 2, 3)]],
        "encoder_hidden_states": torch.zeros(1, 7, 8),
    }
    (grid,) = qwen_image.layout(arguments, torch.nn.Identity()).grids
    assert (grid.shape, grid.text_before, grid.text_after) == ((1, 4, 6), 7, 6)


@pytest.mark.parametrize(
    "scheduler",
    [
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_steps_are_counted_with_any_scheduler(scheduler: str) -> None:
    import diffusers

    pipe = pipeline("sd")
    old = pipe.scheduler
    spy = Spy()
    try:
        with attach(pipe, spy):
            pipe.scheduler = getattr(diffusers, scheduler)()
            run("sd", num_inference_steps=4)
            run("sd", num_inference_steps=3)
    finally:
        pipe.scheduler = old
    seen = [(c.step, c.steps) for c in spy.seen if c.layer == 0]
    assert seen == [(s, 4) for s in range(4)] + [(s, 3) for s in range(3)]


def test_a_repeated_timestep_is_a_step_of_its_own() -> None:
    spy = Spy()
    with attach(pipeline("sd"), spy):  # PNDM
        run("sd", num_inference_steps=4)
    assert [c.step for c in spy.seen if c.layer == 0] == [0, 1, 2, 3, 4]


def test_the_presets_of_a_variant_are_told_from_the_model() -> None:
    handle = attach(pipeline("wan22"), "radial")
    assert "Wan2.2" in handle.report().preset
    handle.detach()


def test_a_family_of_your_own_is_one_entry() -> None:
    def upside_down(arguments: Any, denoiser: torch.nn.Module) -> Layout:
        argument(arguments, "hidden_states")
        return latent_video(arguments, denoiser)

    stand_in = Family("mine", ("WanTransformer3DModel",), (r"blocks\.1\.attn1",), upside_down)
    known = dict(families())
    try:
        _FAMILIES.clear()
        register_family(stand_in)
        with attach(pipeline("wan"), "dense") as handle:
            run("wan", num_inference_steps=1)
            assert [layer.site for layer in handle.report().layers] == [
                "transformer.blocks.1.attn1"
            ]
    finally:
        _FAMILIES.clear()
        _FAMILIES.update(known)


def test_an_unknown_grid_runs_dense_and_says_why() -> None:
    def lost(arguments: Any, denoiser: torch.nn.Module) -> Layout:
        raise AttachError("no map")

    known = families()["wan"]
    try:
        register_family(Family("wan", known.denoisers, known.sites, lost))
        with attach(pipeline("wan"), Spy()) as handle:
            assert torch.equal(run("wan"), stock("wan"))
            assert handle.report().fallbacks == {"the token grid is not known: no map": 8}
    finally:
        register_family(known)


def test_unknown_toy_names_list_the_known_ones() -> None:
    with pytest.raises(InputError, match="hunyuan_video"):
        tiny.build("wann")
    assert tiny.settings_for("wan")["frames"] == 9


def test_toy_weights_are_the_same_every_time() -> None:
    one, two = tiny.build("flux").transformer, tiny.build("flux").transformer
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_fusing_projections_while_attached_keeps_the_plan(fused: bool) -> None:
    pipe = build_toy("cogvideox")  # fuses by exchanging processor objects
    spy = Spy()
    originals = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    with attach(pipe, spy):
        pipe.transformer.fuse_qkv_projections()
        arguments = {**tiny.call_arguments("cogvideox"), "output_type": "latent"}
        pipe(**{**arguments, "num_inference_steps": 1})
        if not fused:
            pipe.transformer.unfuse_qkv_projections()
    assert len(spy.seen) == 2
    if fused:
        pipe.transformer.unfuse_qkv_projections()
    now = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    assert now == originals
    assert not any("_dit_stock" in vars(type(p)) for p in now)


class Case(NamedTuple):
    """A denoiser outside of a pipeline, its forward arguments, and what must be seen."""

    denoiser: torch.nn.Module
    arguments: dict[str, Any]
    grid: str


def wan_i2v() -> Case:
    """Image tokens come by a second cross-attention; the timestep differs per token (5B)."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        ffn_dim=32,
        num_layers=2,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )
    arguments = {
        "hidden_states": torch.randn(1, 36, 3, 4, 6),
        "timestep": torch.full((1, 18), 500),
        "encoder_hidden_states": torch.randn(1, 512, 32),
        "encoder_hidden_states_image": torch.randn(1, 5, 8),
    }
    return Case(model, arguments, "3x2x3")


def cogvideox15() -> Case:
    """Patches in time."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        patch_size_t=2,
        use_rotary_positional_embeddings=True,
        max_text_seq_length=16,
        patch_bias=False,
    )
    arguments = {
        "hidden_states": torch.randn(1, 4, 4, 4, 6),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (torch.rand(12, 16), torch.rand(12, 16)),
    }
    return Case(model, arguments, "2x2x3 + 16 text")


def flux_kontext() -> Case:
    """A reference image of another size behind the image."""
    model = pipeline("flux").transformer
    rows = [(0, h, w) for h in range(4) for w in range(6)]
    rows += [(1, h, w) for h in range(2) for w in range(5)]
    arguments = {
        "hidden_states": torch.randn(1, 34, 4),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.tensor(rows).float(),
        "txt_ids": torch.zeros(7, 3),
    }
    return Case(model, arguments, "1x4x6 + 17 text")


@pytest.mark.parametrize("make", [wan_i2v, cogvideox15, flux_kontext])
def test_variants_of_a_family(make: Callable[[], Case]) -> None:
    denoiser, arguments, grid = make()
    denoiser.eval()
    with torch.no_grad():
        expected = denoiser(**arguments).sample
        with attach(denoiser, "dense") as handle:
            assert torch.equal(denoiser(**arguments).sample, expected)
            report = handle.report()
        assert (report.grids, report.calls["dense"], report.fallbacks) == ([grid], 2, {})
        with attach(denoiser, Whole(), backend="reference"):
            torch.testing.assert_close(denoiser(**arguments).sample, expected, atol=1e-4, rtol=1e-4)
