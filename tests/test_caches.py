"""Step caches of diffusers beside a plan: they skip calls, the plan holds for the rest."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from toys import Spy, generate

from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.patches import attach
from dittools.pipelines import tiny

STEPS = 8


class Cache(NamedTuple):
    """A cache and how it is set up for a toy pipeline, so that it skips something."""

    config: str
    make: Callable[[Any], dict[str, Any]]


def pyramid(pipe: Any) -> dict[str, Any]:
    return {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 950),
        "cross_attention_block_skip_range": 3,
        "cross_attention_timestep_skip_range": (100, 950),
        "current_timestep_callback": lambda: pipe._current_timestep,
    }


CACHES = {
    "first block": Cache("FirstBlockCacheConfig", lambda _: {"threshold": 0.5}),
    "pyramid": Cache("PyramidAttentionBroadcastConfig", pyramid),
    "taylorseer": Cache(
        "TaylorSeerCacheConfig",
        lambda pipe: {
            "cache_interval": 2,
            "disable_cache_before_step": 2,
            "taylor_factors_dtype": torch.float32,
            # without help it finds nothing to cache in Wan
            "cache_identifiers": [r"blocks\.\d+\.attn1"] if "Wan" in type(pipe).__name__ else None,
        },
    ),
    "mag": Cache(
        "MagCacheConfig",
        lambda _: {
            "threshold": 0.5,
            "max_skip_steps": 2,
            "num_inference_steps": STEPS,
            "mag_ratios": torch.ones(STEPS),
        },
    ),
    "sea": Cache("SeaCacheConfig", lambda _: {"threshold": 0.5}),
}


def config(cache: str, pipe: Any) -> Any:
    name, make = CACHES[cache]
    kind = getattr(diffusers, name, None) or getattr(diffusers.hooks, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return kind(**make(pipe))


def count_calls(denoiser: torch.nn.Module, paths: list[str]) -> Counter[str]:
    """Count the attention calls that are really made, without dittools."""
    made: Counter[str] = Counter()
    for path in paths:
        projection = denoiser.get_submodule(path).to_q
        projection.register_forward_pre_hook(lambda *_, path=path: made.update([path]))
    return made


def sites(pipe: Any) -> list[str]:
    with attach(pipe, "dense") as handle:
        return [layer.site.removeprefix("transformer.") for layer in handle.report().layers]


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.cell("cache: {cache}")
def test_a_cache_skips_the_same_calls_with_a_plan_beside_it(name: str, cache: str) -> None:
    if (name, cache) == ("flux", "sea"):
        pytest.skip("diffusers has SeaCache for Wan and Cosmos only")
    pipe, spy = tiny.build(name), Spy()
    plain = generate(pipe, name, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(config(cache, pipe))
    made = count_calls(pipe.transformer, sites(pipe))
    alone = generate(pipe, name, num_inference_steps=STEPS)
    assert not torch.equal(alone, plain)
    by_site, visits = Counter(made), STEPS * (2 if name == "wan" else 1)

    with attach(pipe, spy) as handle:
        assert torch.equal(generate(pipe, name, num_inference_steps=STEPS), alone)
        report = handle.report()
    assert {c.site.removeprefix("transformer."): c.dense for c in report.layers} == by_site
    assert [c.skipped for c in report.layers] == [visits - n for n in by_site.values()]
    assert report.skipped == len(by_site) * visits - by_site.total() > 0
    assert f"{report.skipped} calls, left out by a cache" in str(report)
    assert (report.steps, report.forwards) == (STEPS, visits)
    assert report.branches == (["cond", "uncond"] if name == "wan" else ["cond"])
    assert report.coverage["never_fired"] == {}

    pipe.transformer.disable_cache()
    with attach(pipe, spy):  # the other way round: attached first
        pipe.transformer.enable_cache(config(cache, pipe))
        assert torch.equal(generate(pipe, name, num_inference_steps=STEPS), alone)
    assert torch.equal(generate(pipe, name, num_inference_steps=STEPS), alone)


@pytest.mark.parametrize("cache", CACHES)
def test_calls_that_are_left_follow_the_plan_to_the_step(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against stock Wan whose attention function is replaced by masked SDPA from step 2 on."""
    from diffusers.models.transformers import transformer_wan

    pipe = tiny.build("wan")
    method = build("clear", {"radius": 1})
    allowed = method.mask(TokenGrid(3, 2, 3)).to_dense()[0]
    stock = transformer_wan.dispatch_attention_fn
    steps: list[int] = []

    def masked(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if query.shape[1] == key.shape[1]:
            steps.append(pipe.scheduler._step_index or 0)
            if steps[-1] >= 2:
                options["attn_mask"] = allowed
        return stock(query, key, *rest, **options)

    pipe.transformer.enable_cache(config(cache, pipe))
    with monkeypatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", masked)
        expected = generate(pipe, "wan", num_inference_steps=STEPS)
    with attach(pipe, method, dense_steps=2, backend="reference") as handle:
        made = generate(pipe, "wan", num_inference_steps=STEPS)
        report = handle.report()
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=2e-5)
    assert report.calls == {
        "sparse": sum(step >= 2 for step in steps),
        "dense": sum(step < 2 for step in steps),
        "passed_through": 0,
    }
    assert report.calls["sparse"] > 0
    assert report.density < 1
