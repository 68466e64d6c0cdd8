"""High-resolution images with CLEAR: rungs, the authors' numbers, the stock pipeline beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dittools
from dittools.cli import main
from dittools.errors import AttachError, DitToolsError, InputError
from dittools.methods import build
from dittools.methods.clear import Clear
from dittools.methods.clear_weights import trained_names
from dittools.patches.attach import find_targets
from dittools.pipelines import highres, tiny
from dittools.pipelines.highres import clear_plan
from dittools.pipelines.rungs import Recipe, encode, ladder
from dittools.pipelines.tail import enlarged, tail_of

PROMPT = "a red circle"
QUICK = Recipe(steps=2, strength=0.5)
BASE = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)


@pytest.fixture
def pipe() -> Any:
    made = tiny.build("flux")
    made.set_progress_bar_config(disable=True)
    return made


def climb(pipe: Any, **changes: Any) -> Any:
    wanted = {"height": 32, "width": 32, "image": BASE, "radius": 3.0, "recipe": QUICK}
    arguments: dict[str, Any] = {**wanted, "max_sequence_length": 16, **changes}
    return highres(pipe, PROMPT, **arguments)


def state_of(pipe: Any) -> tuple[Any, ...]:
    model = pipe.transformer
    weights = tuple(float(p.double().sum()) for p in model.parameters())
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    processors = tuple(map(type, model.attn_processors.values()))
    return pipe.scheduler, model.pos_embed.theta, pipe.vae.use_tiling, weights, hooks, processors


def test_the_recipe_is_the_authors() -> None:
    recipe = Recipe()
    assert (recipe.steps, recipe.strength, recipe.guidance, recipe.ntk_factor) == (20, 0.7, 7.5, 10)
    flow = tiny.build("flux").scheduler
    assert tail_of(flow, recipe.steps, recipe.strength, 1.0, round_up=True)[1] == 6
    assert recipe.tiling
    plan = clear_plan(find_targets(tiny.build("flux"))[0], None, 16.0)
    assert plan.rules[0].method == Clear(16.0, proportional=True)
    tuned = clear_plan(find_targets(tiny.build("flux"))[0], {}, 16.0)
    assert tuned.rules[0].method == Clear(16.0, proportional=True, fine_tuned=True)


@pytest.mark.parametrize(
    ("native", "wanted", "growth", "sizes"),
    [
        ((512, 1024), (2048, 4096), 2.0, [(1024, 2048), (2048, 4096)]),
        ((512, 1024), (2048, 4096), None, [(2048, 4096)]),
        ((1024, 1024), (1100, 1024), 2.0, [(1100, 1024)]),
        ((100, 100), (300, 300), 2.0, [(173, 173), (300, 300)]),
        ((128, 128), (1024, 1024), 2.0, [(256, 256), (512, 512), (1024, 1024)]),
    ],
)
def test_rungs_are_equal_factors(native: Any, wanted: Any, growth: Any, sizes: Any) -> None:
    assert ladder(native, wanted, growth) == sizes


def test_without_a_mask_a_rung_is_the_stock_image_to_image_pipeline(pipe: Any) -> None:
    """Schedule, noise level, packing and decoding, with a strength that is no whole step."""
    from diffusers import FluxImg2ImgPipeline

    recipe = Recipe(steps=5, strength=0.5, guidance=3.0, ntk_factor=1.0, growth=None, tiling=False)
    noise = torch.Generator().manual_seed(3)
    drawn = torch.Generator().manual_seed(3)
    made = climb(pipe, recipe=recipe, plan="dense", generator=noise, max_sequence_length=16)
    clean = encode(pipe, enlarged(BASE[None], (32, 32), (32, 32), bicubic=True))
    flow = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    flow.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    sigma = float(flow.sigmas[2])
    noisy = (1 - sigma) * clean + sigma * torch.randn(clean.shape, generator=drawn)
    stock = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": flow})
    stock.set_progress_bar_config(disable=True)
    want = stock(
        PROMPT,
        image=enlarged(BASE[None], (32, 32), (32, 32), bicubic=True)[:, :, 0],
        height=32,
        width=32,
        strength=0.5,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=pipe._pack_latents(noisy, *noisy.shape),
        max_sequence_length=16,
        output_type="np",
    ).images[0]
    assert (made.report["rungs"][0]["first_step"], made.report["rungs"][0]["steps"]) == (2, 3)
    np.testing.assert_allclose(made.image, want, atol=1e-5)


def test_every_rung_runs_under_the_disk_and_all_is_restored(pipe: Any) -> None:
    before, seen = state_of(pipe), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda *_: seen.append((pipe.transformer.pos_embed.theta, pipe.vae.use_tiling))
    )
    small = {"image": None, "native_height": 16, "native_width": 16, "backend": "cpu"}
    made = climb(pipe, height=37, width=50, **small)
    hook.remove()
    assert state_of(pipe) == before
    sizes = [(16, 16), *ladder((16, 16), (37, 50), 2.0)]
    assert [image.shape for image in made.rungs] == [(*size, 3) for size in sizes]
    assert len(sizes) == 3
    assert made.image.shape == (37, 50, 3)
    assert np.isfinite(made.image).all()
    stretched = [theta for theta, tiled in seen if tiled]
    assert set(stretched) == {pipe.transformer.pos_embed.theta * 10}
    assert all(row["density"] < 1 for row in made.report["rungs"])
    assert json.loads(json.dumps(made.report))["target"] == [37, 50]


def test_one_seed_is_one_image_and_rungs_draw_fresh_noise(pipe: Any) -> None:
    first, again, other = climb(pipe), climb(pipe), climb(pipe, seed=1)
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_weights_are_there_for_the_rungs_only_and_choose_the_cells(
    pipe: Any, tmp_path: Any
) -> None:
    from safetensors.torch import save_file

    model, before = pipe.transformer, state_of(pipe)
    own = dict(model.named_parameters())
    weights = {name: own[name].detach() * 1.5 for name in trained_names(model)}
    weights |= {
        f"{kind}.0.attn.processor.spatial_weight": torch.full((2, 2), 0.25)
        for kind in ("transformer_blocks", "single_transformer_blocks")
    }
    save_file(weights, tmp_path / "clear.safetensors")
    plain = climb(pipe, down_factor=2)
    made = climb(pipe, weights=tmp_path / "clear.safetensors")
    assert made.report["rungs"][0]["density"] == plain.report["rungs"][0]["density"]
    assert not np.array_equal(made.image, plain.image)
    assert state_of(pipe) == before
    with pytest.raises(InputError, match="down_factor differs from the weights; expected 2; got 4"):
        climb(pipe, weights=weights, down_factor=4)
    weights.pop("transformer_blocks.0.attn.processor.spatial_weight")
    with pytest.raises(InputError, match="cell weights do not fit"):
        climb(pipe, weights=weights)


def test_cells_are_whole_at_any_size(pipe: Any) -> None:
    made = climb(pipe, height=33, width=41, down_factor=4)
    sides = made.report["rungs"][-1]["padded"]
    assert all(side % (4 * 2 * pipe.vae_scale_factor) == 0 for side in sides)
    assert made.reports[-1].fallbacks == {}
    assert made.image.shape == (33, 41, 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"height": 16, "width": 16}, "not above the base image's"),
        ({"height": 0}, "height is not usable"),
        ({"image": BASE[0]}, "image is not usable"),
        ({"latents": torch.zeros(1)}, "sets latents itself"),
        ({"plan": "gna", "weights": {}}, "CLEAR's own mask"),
        ({"plan": "no such"}, "not a plan|unknown|no plan"),
        ({"radius": 0.0}, "radius is not usable"),
        ({"weights": "nowhere.safetensors"}, "cannot read weights"),
        ({"weights": {"x": torch.zeros(1)}}, "not CLEAR weights"),
        ({"sharpness": 3}, "takes no sharpness"),
        ({"recipe": Recipe(steps=3, strength=0.1), "steps_": 1}, "takes no steps_"),
    ],
)
def test_bad_input_is_one_clear_error(pipe: Any, changes: dict[str, Any], text: str) -> None:
    before = state_of(pipe)
    with pytest.raises(DitToolsError, match=text) as caught:
        climb(pipe, **changes)
    assert "\n" not in str(caught.value)
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"strength": 0.0}, {"growth": 1.0}, {"ntk_factor": 0.0}]
)
def test_unusable_recipes_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(values))} is not usable"):
        Recipe(**values)


def test_other_pipelines_and_attached_plans_are_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match=r"does not run on WanPipeline; expected a Flux\.1"):
        climb(tiny.build("wan"))
    with dittools.attach(pipe, build("gna")), pytest.raises(AttachError, match="plan is attached"):
        climb(pipe)


def test_the_command_writes_every_rung(tmp_path: Path, capsys: Any) -> None:
    options = "--height 40 --width 24 --native-height 16 --native-width 16 --steps 2 --radius 2"
    words = ["highres", "--prompt", PROMPT, *options.split(), "--strength", "0.5", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path)])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == [40, 24]
    assert {path.name for path in tmp_path.iterdir()} == {
        "rung0.png",
        "rung1.png",
        "image.png",
        "report.json",
    }
    with pytest.raises(SystemExit) as ended:
        main([*words, "--growth", "1", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "growth is not usable" in capsys.readouterr().err
