"""Ways to call a pipeline that must not disturb a plan: batches, callbacks, conditions, threads."""

import copy
import gc
import threading
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from toys import Spy, Whole, generate

from dittools.patches import attach
from dittools.patches.refusals import UNKNOWN_LENGTH
from dittools.patches.steps import StepClock
from dittools.pipelines import tiny

both_families = pytest.mark.parametrize("name", ["wan", "flux"])
TWO = ["a red circle moving left over a plain background", "a"]
LAYERS = 2


@cache
def pipeline(name: str) -> Any:
    return tiny.build(name)


def branches(name: str) -> int:
    return 2 if name == "wan" else 1


def check_equal(pipe: Any, name: str, expected: torch.Tensor, calls: int, **how: Any) -> None:
    """Dense bit for bit and the sparse path keeping all within rounding, on so many calls."""
    with attach(pipe, "dense") as handle:
        assert torch.equal(generate(pipe, name, **how), expected)
        assert handle.report().calls == {"sparse": 0, "dense": calls, "passed_through": 0}
    with attach(pipe, Whole(), backend="reference") as handle:
        torch.testing.assert_close(generate(pipe, name, **how), expected, atol=2e-5, rtol=2e-5)
        assert handle.report().calls["sparse"] == calls
        assert handle.report().fallbacks == {}


@both_families
@pytest.mark.parametrize("per_prompt", [1, 2])
@pytest.mark.cell("batches, several outputs per prompt")
def test_batches_of_prompts_of_different_length(name: str, per_prompt: int) -> None:
    key = "num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"
    how: dict[str, Any] = {"prompt": TWO, key: per_prompt, "num_inference_steps": 2}
    expected = generate(pipeline(name), name, **how)
    assert len(expected) == 2 * per_prompt
    check_equal(pipeline(name), name, expected, LAYERS * 2 * branches(name), **how)


@both_families
@pytest.mark.cell("batches, several outputs per prompt")
def test_rows_of_a_batch_do_not_mix_under_a_sparse_plan(name: str) -> None:
    """Each row of a batch is what the prompt gives alone, from the same noise."""
    from dittools.methods import METHODS

    pipe = pipeline(name)
    how: dict[str, Any] = {"num_inference_steps": 2}
    one = generate(pipe, name, prompt=TWO, **how)
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(3))
    for method in (m for m in METHODS if m != "oracle"):
        with attach(pipe, method, dense_steps=0, backend="reference"):
            together = generate(pipe, name, prompt=TWO, latents=noise, **how)
            for index, prompt in enumerate(TWO):
                alone = generate(pipe, name, prompt=prompt, latents=noise[index : index + 1], **how)
                torch.testing.assert_close(
                    together[index : index + 1], alone, atol=5e-5, rtol=5e-5, msg=method
                )


@both_families
@pytest.mark.cell("callback, interrupt, second size")
def test_callbacks_see_every_step_and_may_interrupt(name: str) -> None:
    pipe, spy, seen = pipeline(name), Spy(), list[int]()

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == 1
        return tensors

    expected = generate(pipe, name, callback_on_step_end=note)
    whole = generate(pipe, name)
    seen.clear()
    with attach(pipe, spy) as handle:
        assert torch.equal(generate(pipe, name, callback_on_step_end=note), expected)
        assert seen[:2] == [0, 1]
        assert sorted({c.step for c in spy.seen}) == [0, 1]
        spy.seen.clear()
        assert torch.equal(generate(pipe, name), whole)  # the run after it starts anew
        assert [c.step for c in spy.seen if c.layer == 0] == sorted([0, 1, 2, 3] * branches(name))
        assert handle.report().skipped == 0


@both_families
@pytest.mark.cell("callback, interrupt, second size")
def test_an_attachment_outlives_a_change_of_size(name: str) -> None:
    pipe = pipeline(name)
    other = {"height": 48, "width": 80}
    with attach(pipe, "radial" if name == "wan" else "clear", backend="reference") as handle:
        together = [generate(pipe, name, **how) for how in ({}, other, {})]
        assert len(handle.report().grids) == 2
    assert torch.equal(together[0], together[2])
    with attach(pipe, "radial" if name == "wan" else "clear", backend="reference"):
        assert torch.equal(generate(pipe, name, **other), together[1])


@both_families
@pytest.mark.cell("two pipelines in two threads")
def test_two_pipelines_in_two_threads_do_not_mix(name: str) -> None:
    """A toy of this family beside one of the other."""
    names = [name, "flux" if name == "wan" else "wan"]
    pipes, spies, steps = [tiny.build(n) for n in names], [Spy(), Spy()], [3, 5]
    expected = [
        generate(p, n, num_inference_steps=s) for p, n, s in zip(pipes, names, steps, strict=True)
    ]
    handles = [attach(pipes[0], spies[0]), attach(pipes[1], spies[1], dense_layers=1)]
    made: list[Any] = [None, None]

    def work(index: int) -> None:
        made[index] = generate(pipes[index], names[index], num_inference_steps=steps[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(made, expected, strict=True):
        assert torch.equal(got, want)
    for index, left in ((0, LAYERS), (1, LAYERS - 1)):
        calls = [c.step for c in spies[index].seen]
        per_step = left * branches(names[index])
        assert calls == [s for s in range(steps[index]) for _ in range(per_step)]
        assert handles[index].report().fallbacks.keys() <= {
            "the method keeps every pair at this size"
        }


@both_families
@pytest.mark.cell("pipelines that share the model (from_pipe)")
def test_a_pipeline_made_from_another_shares_the_plan(name: str) -> None:
    from diffusers import FluxImg2ImgPipeline, WanVideoToVideoPipeline

    pipe, spy = tiny.build(name), Spy()
    kind = WanVideoToVideoPipeline if name == "wan" else FluxImg2ImgPipeline
    how: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 4}
    if name == "wan":
        source = torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(1))
        how |= {"video": list(source[0]), "num_frames": None}
    else:
        how["image"] = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))

    def changed(second: Any) -> torch.Tensor:
        arguments = {**tiny.call_arguments(name), "output_type": "latent", **how}
        arguments = {k: v for k, v in arguments.items() if v is not None}
        made = second(**arguments, generator=torch.Generator().manual_seed(0))
        latents: torch.Tensor = made.frames if name == "wan" else made.images
        return latents

    second = kind.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    expected = changed(second)
    with attach(pipe, spy, dense_steps=0.5):
        assert torch.equal(changed(second), expected)
    # half of the 4 steps run, counted from 0, and half of those stay dense
    assert {(c.step, c.steps) for c in spy.seen} == {(1, 2)}
    assert len(spy.seen) == LAYERS * branches(name)


def modular(name: str) -> tuple[Any, dict[str, Any]]:
    pipe = tiny.build(name)
    if name == "wan":
        blocks = pytest.importorskip("diffusers.modular_pipelines.wan").WanBlocks()
        how: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "output": "videos"}
    else:
        blocks = pytest.importorskip("diffusers.modular_pipelines.flux").FluxAutoBlocks()
        how = {"height": 16, "width": 24, "output": "images"}
    made = blocks.init_pipeline()
    made.update_components(
        **{k: v for k, v in pipe.components.items() if k in made.components and v is not None}
    )
    made.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a red circle", "num_inference_steps": 4, "max_sequence_length": 16}
    return made, {**arguments, **how, "output_type": "pt"}


@both_families
@pytest.mark.cell("modular pipeline")
def test_modular_pipelines_run_the_plan(name: str) -> None:
    pipe, how = modular(name)

    def make() -> torch.Tensor:
        out: torch.Tensor = pipe(**how, generator=torch.Generator().manual_seed(0))
        return out

    expected, spy = make(), Spy()
    with attach(pipe, spy, dense_steps=1) as handle:
        assert torch.equal(make(), expected)
        report = handle.report()
    assert [(c.step, c.branch) for c in spy.seen if c.layer == 0] == [
        (step, branch) for step in (1, 2, 3) for branch in ("cond", "uncond")[: branches(name)]
    ]
    assert report.steps == 4
    assert torch.equal(make(), expected)


def image_adapter(name: str) -> tuple[Any, dict[str, Any]]:
    """A toy pipeline with the weights of an IP-adapter, and the image it is given."""
    pipe = tiny.build(name)
    denoiser = pipe.unet if name == "sd" else pipe.transformer
    width = denoiser.config.cross_attention_dim if name == "sd" else 32
    weights: dict[str, dict[str, torch.Tensor]] = {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 8),
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }
    number = 1 if name == "sd" else 0
    for path, processor in denoiser.attn_processors.items():
        if "single" in path or (name == "sd" and "attn2" not in path):
            continue
        inner = denoiser.get_submodule(path.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights["ip_adapter"][f"{number}.{part}.weight"] = torch.randn(inner, width)
            if name == "flux":
                weights["ip_adapter"][f"{number}.{part}.bias"] = torch.zeros(inner)
        number += 2 if name == "sd" else 1
        assert processor is not None
    rows = 2 if name == "sd" else 1  # [negative, positive] under guidance
    embeds = torch.randn(rows, 1, 8) if name == "sd" else torch.randn(1, 1, 8)
    denoiser._load_ip_adapter_weights([weights])
    how = {"ip_adapter_image_embeds": [embeds]}
    if name == "flux":
        how["negative_ip_adapter_image_embeds"] = [torch.zeros_like(embeds)]
    return pipe, how


@pytest.mark.parametrize("name", ["flux", "sd"])
@pytest.mark.cell("IP-adapter")
def test_an_image_adapter_adds_its_call_beside_the_plans(name: str) -> None:
    pipe, how = image_adapter(name)
    expected = generate(pipe, name, **how)
    assert not torch.equal(expected, generate(tiny.build(name), name))
    with attach(pipe, "dense") as handle:
        assert torch.equal(generate(pipe, name, **how), expected)
        calls = handle.report().calls
    # the double block of Flux also attends to the image; in SD that is a module of its own
    assert calls["passed_through"] == (4 if name == "flux" else 0)
    with attach(pipe, Whole(), backend="reference") as handle:
        made = generate(pipe, name, **how)
        assert (made - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert handle.report().calls["sparse"] == calls["dense"] > 0
        assert handle.report().coverage["never_fired"] == {}
    assert torch.equal(generate(pipe, name, **how), expected)


@pytest.mark.parametrize("name", ["flux", "sd"])
@pytest.mark.cell("IP-adapter")
def test_an_image_adapter_loaded_while_attached_is_taken_up(name: str) -> None:
    torch.manual_seed(0)
    pipe, how = image_adapter(name)
    expected = generate(pipe, name, **how)
    late = tiny.build(name)
    denoiser = late.unet if name == "sd" else late.transformer
    with attach(late, Spy()) as handle:
        generate(late, name)
        kept = {"build": tiny.build}
        tiny.build = lambda _: late  # the same weights, loaded into the attached pipeline
        try:
            torch.manual_seed(0)
            image_adapter(name)
        finally:
            tiny.build = kept["build"]
        handle.reset()
        assert torch.equal(generate(late, name, **how), expected)
        assert handle.report().coverage["never_fired"] == {}
    left = [m for m in denoiser.modules() if "_dit_stock" in vars(type(m))]
    left += [m for m in denoiser.attn_processors.values() if "_dit_stock" in vars(type(m))]
    assert left == []


@pytest.mark.cell("image conditions", family="wan", note="image-to-video: image embeddings")
def test_wan_image_to_video_attends_to_the_image_beside_the_plan() -> None:
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    parts = tiny.build("wan").components
    config = {**parts["transformer"].config, "in_channels": 36, "image_dim": 8}
    config |= {"added_kv_proj_dim": 24, "pos_embed_seq_len": None}
    config.pop("_use_default_values")  # from_config would take the defaults back
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config(config).eval()
    pipe = WanImageToVideoPipeline(
        **{k: parts[k] for k in ("tokenizer", "text_encoder", "vae", "scheduler")},
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {
        "image": torch.rand(1, 3, 32, 48),
        "image_embeds": torch.randn(1, 5, 8),
        "negative_prompt": "a",
    }
    pipe.check_inputs = lambda *_: None  # it takes the image or its embedding, the model needs both
    expected = generate(pipe, "wan", **how)
    check_equal(pipe, "wan", expected, 16, **how)


def controlled(name: str) -> tuple[Any, dict[str, Any]]:
    import diffusers

    pipe = tiny.build(name)
    image = torch.rand(1, 3, 32, 48)
    if name in ("sd", "sdxl"):
        net = diffusers.ControlNetModel.from_unet(
            pipe.unet, conditioning_embedding_out_channels=(4, 8)
        )
        kind = {
            "sd": diffusers.StableDiffusionControlNetPipeline,
            "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
        }[name]
        how: dict[str, Any] = {"image": image}
    elif name == "sd3":
        net = diffusers.SD3ControlNetModel.from_config({**pipe.transformer.config, "num_layers": 1})
        kind, how = diffusers.StableDiffusion3ControlNetPipeline, {"control_image": image}
    else:
        net = diffusers.FluxControlNetModel.from_config(dict(pipe.transformer.config))
        kind, how = diffusers.FluxControlNetPipeline, {"control_image": image}
    for part in net.parameters():  # control nets start at zero, which changes nothing
        torch.nn.init.normal_(part, std=0.05)
    made = kind(**pipe.components, controlnet=net.eval())
    made.set_progress_bar_config(disable=True)
    return made, {**how, "height": 32, "width": 48, "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["flux", "sd", "sd3", "sdxl"])
@pytest.mark.cell("ControlNet")
def test_a_control_net_works_beside_the_plan_and_is_left_alone(name: str) -> None:
    pipe, how = controlled(name)

    def generate(pipe: Any, name: str, **how: Any) -> torch.Tensor:
        torch.manual_seed(0)  # the control image is encoded with the global generator
        return toys.generate(pipe, name, **how)

    expected = generate(pipe, name, **how)
    plain = {k: v for k, v in how.items() if "image" not in k}
    assert not torch.equal(expected, generate(tiny.build(name), name, **plain))
    with attach(pipe, "dense") as handle:
        assert torch.equal(generate(pipe, name, **how), expected)
        report = handle.report()
    assert all(not layer.site.startswith("controlnet") for layer in report.layers)
    with attach(pipe, Whole(), backend="reference") as handle:
        made = generate(pipe, name, **how)
        assert (made - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert handle.report().calls["sparse"] == report.calls["dense"] > 0
    assert torch.equal(generate(pipe, name, **how), expected)


@pytest.mark.parametrize(
    ("given", "steps"),
    [(1000.0, 5), (500.0, 3), (0.0, 5), (1.0, 5)],
    ids=["from noise", "from a picture", "rescaled: 1 - t", "rescaled: t / 1000"],
)
def test_a_run_is_counted_from_where_it_begins(given: float, steps: int) -> None:
    """Timesteps that a pipeline rescales to 0..1 are no places in a schedule of 0..1000."""

    class Pipe:
        scheduler = SimpleNamespace(
            timesteps=torch.tensor([1000.0, 750.0, 500.0, 1.0, 0.0]),
            _step_index=None,
            num_inference_steps=5,
        )

    pipe = Pipe()
    place = StepClock(pipe).observe(torch.tensor(given))
    assert (place.step, place.steps) == (0, steps)


def places(spy: Spy) -> list[tuple[int, int]]:
    """The steps that were sparse, with the length of their run; counts from here on anew."""
    found = sorted({(call.step, call.steps) for call in spy.seen})
    spy.seen.clear()
    return found


@both_families
@pytest.mark.parametrize("before", ["new", "done", "broken off"])
def test_a_copy_of_a_pipeline_counts_its_own_steps(name: str, before: str) -> None:
    pipe, spy = tiny.build(name), Spy()

    def stop(some: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        some._interrupt = True
        return values

    with attach(pipe, spy):
        if before != "new":
            how = {"callback_on_step_end": stop} if before == "broken off" else {}
            generate(pipe, name, num_inference_steps=3, **how)
            spy.seen.clear()
        twin = copy.deepcopy(pipe)
        for some, steps in ((twin, 2), (pipe, 4), (pipe, 3), (twin, 4), (twin, 2)):
            generate(some, name, num_inference_steps=steps)
            assert places(spy) == [(step, steps) for step in range(steps)]
        del pipe, some
        gc.collect()
        generate(twin, name, num_inference_steps=2)
        assert places(spy) == [(0, 2), (1, 2)]


@both_families
def test_the_run_is_followed_when_the_pipeline_it_was_attached_to_is_gone(name: str) -> None:
    first, spy = tiny.build(name), Spy()
    with attach(first, spy, dense_steps=0.5):
        second = type(first)(**first.components)
        second.set_progress_bar_config(disable=True)
        del first
        gc.collect()
        generate(second, name, num_inference_steps=4)
    assert places(spy) == [(2, 4), (3, 4)]


@both_families
def test_a_scheduler_that_is_at_its_end_is_not_the_one_that_runs(name: str) -> None:
    """Another pipeline with the same model may have one of its own, which nobody named."""
    pipe, spy = tiny.build(name), Spy()
    other = type(pipe.scheduler).from_config(pipe.scheduler.config)
    second = type(pipe)(**{**pipe.components, "scheduler": other})
    second.set_progress_bar_config(disable=True)
    with attach(pipe, spy, dense_steps=1):
        for some in (pipe, second, second, pipe):
            generate(some, name, num_inference_steps=3)
            known = 3 if some is pipe else 0
            assert places(spy) == [(1, known), (2, known)]
    with attach(pipe, spy, dense_steps=0.5) as handle:
        generate(pipe, name, num_inference_steps=3)
        assert places(spy) == [(2, 3)]
        handle.reset()
        generate(second, name, num_inference_steps=3)
        report = handle.report()
        assert places(spy) == []
        assert report.fallbacks == {UNKNOWN_LENGTH: report.calls["dense"]}
