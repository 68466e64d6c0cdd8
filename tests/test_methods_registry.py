"""The registry: names, parameters in and out, presets; and the random floor."""

import json
from dataclasses import fields, replace

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError, UnknownMethod
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.kernels.reference import ReferenceBackend
from dittools.methods import METHODS, GridMethod, Method, build, preset, to_params
from dittools.methods.headhunter import HeadHunter
from dittools.methods.random_blocks import RandomBlocks

GRIDS = {
    "video": TokenGrid(4, 6, 7),
    "text first": TokenGrid(3, 5, 7, 9, 0),
    "text last": TokenGrid(3, 5, 7, 0, 9),
    "one frame": TokenGrid(1, 9, 11, 5, 3),
    "smaller than a block": TokenGrid(1, 2, 3),
    "one token": TokenGrid(1, 1, 1),
}


def call_of(grid: TokenGrid, batch: int = 2, heads: int = 2) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, heads, 8) for _ in range(3))
    return AttentionCall(q, k, v, grid, layer=2, step=3, steps=10)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_every_grid_and_keeps_text_rows_dense(
    name: str, grid: TokenGrid
) -> None:
    method, call, backend = METHODS[name](), call_of(grid), ReferenceBackend()
    assert isinstance(method, Method)
    out, dense = method.attend(call, backend), backend.dense(call)
    assert out.shape == call.query.shape
    assert out.dtype == call.query.dtype
    assert bool(out.isfinite().all())
    text = torch.ones(grid.total, dtype=torch.bool)
    text[grid.text_before : grid.total - grid.text_after] = False
    torch.testing.assert_close(out[:, text], dense[:, text], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_described_and_survive_json(name: str) -> None:
    method = METHODS[name]()
    assert all(len(f.metadata["help"]) > 10 for f in fields(method))
    again = build(name, json.loads(json.dumps(to_params(method))))
    assert again == method
    assert hash(again) == hash(method)
    assert METHODS[name].name == name


@pytest.mark.parametrize(
    "family", ["wan", "wan22", "hunyuan_video", "cogvideox", "flux", "never heard of"]
)
@pytest.mark.parametrize("name", METHODS)
def test_every_preset_builds_and_names_its_source(name: str, family: str) -> None:
    found = preset(name, family)
    assert found.method.name == name
    assert found.source
    assert 0 <= found.dense_steps < 60
    if family == "never heard of" and name != "dense":
        assert "no published preset" in found.source
        assert found.dense_steps == (0 if name == "agent" else 0.25)  # agents act early


def test_published_presets_are_the_authors_numbers() -> None:
    wan = preset("radial", "Wan2.1")
    assert to_params(wan.method)["decay"] == 0.2
    assert (wan.dense_steps * 50, wan.dense_layers) == (12, 1)
    wan22 = preset("radial", "wan22")
    assert (to_params(wan22.method)["block_size"], wan22.dense_steps * 40) == (
        64,
        pytest.approx(11),
    )
    assert to_params(preset("radial", "hunyuan-video").method)["sink"] is False
    gna = preset("gna", "hunyuan_video").method
    assert isinstance(gna, GridMethod)
    assert gna.mask(TokenGrid(30, 48, 80)).density == pytest.approx(30 * 40 * 40 / (30 * 48 * 80))


def test_unknown_names_and_parameters_are_refused_with_the_choices() -> None:
    with pytest.raises(
        UnknownMethod, match=r"unknown method; expected one of dense, radial.*got 'foo'"
    ):
        build("foo", {})
    with pytest.raises(
        UnknownMethod, match=r"radial does not take width; expected decay: float = 0.2"
    ):
        build("radial", {"width": 3})
    with pytest.raises(
        InputError, match=r"random: density .* at most 1.0; got 1.5; try: density is"
    ):
        build("random", {"density": 1.5})
    with pytest.raises(UnknownMethod, match="unknown method"):
        preset("foo", "wan")


@pytest.mark.parametrize("name", METHODS)
def test_a_class_names_its_parameters_when_it_is_given_others(name: str) -> None:
    kind = METHODS[name]
    known = [item.name for item in fields(kind)]
    with pytest.raises(UnknownMethod, match=rf"^{name} does not take widht; expected ") as refused:
        kind(widht=3)
    assert "got {'widht': 3}" in str(refused.value)
    assert all(f"{item}: " in refused.value.expected for item in known)
    with pytest.raises(UnknownMethod, match=f"{name} takes at most {len(known)} values"):
        kind(*range(len(known) + 1))
    for item in known:
        with pytest.raises(UnknownMethod, match=f"try: {item}$"):
            kind(**{item[:-1] + "q": 1})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tome"])  # images alone
def test_scores_that_half_precision_cannot_hold_do_no_harm(name: str) -> None:
    """Products of large queries and keys pass 65,504 before the scale makes them small."""
    grid = TokenGrid(4, 10, 12, 0, 13)
    both = torch.randn(1, grid.total, 2, 128)
    q, k = ((both + torch.randn_like(both)).mul(32).half() for _ in range(2))
    assert not (q[0, :, 0] @ k[0, :, 0].T).isfinite().all()
    half = AttentionCall(q, k, torch.randn_like(both).half(), grid, layer=2, step=3, steps=10)
    wide = replace(half, query=q.float(), key=k.float(), value=half.value.float())
    method = build(name)
    if not method.not_supported(half):
        got, want = (method.attend(call, load("cpu")).float() for call in (half, wide))
        assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("name", ["radial", "vmoba", "psa", "svg", "svg2", "sparge"])
def test_gradients_flow_past_what_is_chosen(name: str) -> None:
    """With its blocks chosen, a method is linear in the values: its gradient says what it does."""
    call = call_of(TokenGrid(4, 8, 8, 0, 9), batch=1)
    method, backend = build(name), load("cpu")
    call = replace(call, query=call.query.requires_grad_())
    weight, other = torch.randn_like(call.value), torch.randn_like(call.value)
    value = call.value.clone().requires_grad_()
    loss = (method.attend(replace(call, value=value), backend) * weight).sum()
    along, turned = torch.autograd.grad(loss, (value, call.query))
    with torch.no_grad():
        there = method.attend(replace(call, value=other), backend)
    torch.testing.assert_close((along * other).sum(), (there * weight).sum(), rtol=1e-4, atol=1e-3)
    assert turned.isfinite().all()
    assert turned.abs().amax() > 0


def test_near_misses_are_suggested() -> None:
    for wrong, right in (("Radial", "radial"), ("svg-2", "svg2"), ("sparse_vid", "sparse_vdit")):
        with pytest.raises(UnknownMethod, match=f"got '{wrong}'; try: {right}$"):
            build(wrong)
    with pytest.raises(UnknownMethod, match=r"got 'foo'$"):
        build("foo")
    with pytest.raises(UnknownMethod, match=r"headhunter does not take head; .*; try: heads$"):
        HeadHunter(head=["L0"])  # type: ignore[call-arg]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("text", [(0, 0), (40, 0), (0, 100)])
def test_random_blocks_keep_exactly_the_density_asked_for(
    density: float, text: tuple[int, int]
) -> None:
    grid = TokenGrid(10, 16, 16, *text)
    mask = RandomBlocks(density=density, block_size=32).mask(grid, heads=3, layer=1)
    blocks = mask.keep.shape[1]
    least = 1 - (1 - -(-sum(text) // 32) / blocks) ** 2 + 2 / blocks
    if density > least:
        assert mask.keep.sum((1, 2)).tolist() == [round(density * blocks**2)] * 3
    video = mask.keep[:, 4:-5].sum(2)
    assert int(video.max() - video.min()) <= 1
    assert bool(mask.keep.diagonal(dim1=1, dim2=2).all())


def test_random_blocks_differ_by_seed_head_and_layer_and_repeat_otherwise() -> None:
    grid, method = TokenGrid(10, 16, 16), RandomBlocks(density=0.3, block_size=32)
    first = method.mask(grid, 2, 0).keep.clone()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, method.mask(grid, 2, 1).keep)
    assert not torch.equal(
        first, RandomBlocks(density=0.3, block_size=32, seed=1).mask(grid, 2, 0).keep
    )
    from dittools.methods.random_blocks import random_mask

    random_mask.cache_clear()
    assert torch.equal(first, method.mask(grid, 2, 0).keep)


def test_two_resolutions_back_to_back_do_not_share_a_mask() -> None:
    backend = ReferenceBackend()
    for name in METHODS:
        method = METHODS[name]()
        small, large = call_of(GRIDS["video"]), call_of(GRIDS["text last"])
        alone = replace(small, memory={})
        wanted = [method.attend(alone, backend) for _ in range(2)]  # a method may remember
        first = method.attend(small, backend)
        method.attend(replace(large, memory=small.memory), backend)
        assert torch.equal(first, wanted[0])
        assert torch.equal(method.attend(small, backend), wanted[1])
