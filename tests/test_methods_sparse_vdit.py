"""Sparse-vDiT: five patterns, their densities, the loss that chooses among them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import generate

from dittools.call import AttentionCall
from dittools.errors import InputError, PlanError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.bands import band_density, band_mask, band_width
from dittools.methods.sparse_vdit import (
    MODES,
    SparseVDiT,
    choose_modes,
    expand_modes,
    mode_losses,
)
from dittools.patches import attach
from dittools.pipelines import tiny
from dittools.plans import Plan, Rule
from dittools.plans.plan import ModelFacts

BACKEND = ReferenceBackend()


def call_of(grid: TokenGrid, batch: int = 1, heads: int = 2, scale: float = 1.0) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, heads, 8) * scale for _ in range(3))
    return AttentionCall(q, k, v, grid)


@pytest.mark.parametrize(
    ("density", "tokens", "text", "frame", "width_frames", "width"),
    [
        (0.25, 45_106, 226, 4080, 1.4174, 5783),
        (0.30, 45_106, 226, 4080, 1.7398, 7098.5),
        (0.25, 119_056, 256, 3600, 4.3487, 15_655.3),
        (0.15, 119_056, 256, 3600, 2.5040, 9014.5),
        (0.30, 75_600, 0, 3600, 3.4301, 12_348.5),
        (0.25, 75_600, 0, 3600, 2.8135, 10_128.5),
    ],
)
def test_band_widths_are_those_of_the_svg_scripts(
    density: float, tokens: int, text: int, frame: int, width_frames: float, width: float
) -> None:
    found = band_width(density, tokens, text)
    assert found == pytest.approx(width, abs=0.6)
    assert found / frame == pytest.approx(width_frames, abs=2e-4)
    assert 1 - (1 - found / tokens) ** 2 + 2 * text / tokens == pytest.approx(density, abs=1e-4)


@pytest.mark.parametrize(
    ("blocks", "half", "density", "asked"),
    [
        (16, 2, 0.289063, 0.3),
        (64, 8, 0.248047, 0.25),
        (353, 47, 0.251017, 0.25),
        (931, 73, 0.151662, 0.152),
    ],
)
def test_block_bands_have_their_closed_form_density(
    blocks: int, half: int, density: float, asked: float
) -> None:
    assert band_density(blocks, half) == pytest.approx(density, abs=1e-6)
    mask = band_mask(TokenGrid(1, 1, blocks * 16), asked, 16, False, False)
    assert mask.density == pytest.approx(density, abs=1e-6)
    reach = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs() <= half
    assert torch.equal(mask.keep[0], reach)


def test_the_multi_diagonal_keeps_the_same_place_in_every_frame() -> None:
    grid = TokenGrid(4, 8, 8)
    method = SparseVDiT(density=0.29, block_size=16)
    dense = method.mask(grid, "multi_diagonal").to_dense()[0].view(4, 64, 4, 64)
    assert method.mask(grid, "multi_diagonal").density == 0.2890625
    assert method.mask(grid, "diagonal").density == 0.2890625
    place = torch.arange(64)
    assert bool(dense[:, place, :, place].all())
    offset = (place[:, None] - place).abs()[None, :, None].expand_as(dense)
    assert int(offset[dense].max()) == 11  # below ((m + 1) * b - 1) / f = 11.75


@pytest.mark.parametrize("mode", ["diagonal", "multi_diagonal", "stripe"])
@pytest.mark.parametrize("text", [(0, 0), (0, 13), (11, 0), (5, 6), (226, 0), (0, 256)])
def test_every_pattern_is_sdpa_under_its_expanded_mask(mode: str, text: tuple[int, int]) -> None:
    grid = TokenGrid(6, 7, 9, *text)
    method = SparseVDiT(mode=mode, density=0.4, block_size=16)
    call, allowed = call_of(grid, batch=2), method.mask(grid).to_dense()
    assert 0.2 < float(allowed.float().mean()) < 0.8
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    got = method.attend(call, BACKEND)
    torch.testing.assert_close(got, expected.transpose(1, 2), atol=3e-6, rtol=1e-5)
    is_text = torch.ones(grid.total, dtype=torch.bool)
    is_text[text[0] : text[0] + grid.tokens] = False
    assert bool(allowed[0][is_text].all())
    assert bool(allowed[0][:, is_text].all())


def test_position_order_is_the_diagonal_of_reordered_tokens() -> None:
    grid, method = TokenGrid(5, 6, 8), SparseVDiT(density=0.3, block_size=16)
    call = call_of(grid)
    swap = torch.arange(grid.tokens).view(5, 48).t().reshape(-1)
    swapped = AttentionCall(
        call.query[:, swap], call.key[:, swap], call.value[:, swap], TokenGrid(1, 1, 240)
    )
    inner = SparseVDiT(mode="diagonal", density=0.3, block_size=16).attend(swapped, BACKEND)
    expected = torch.empty_like(inner)
    expected[:, swap] = inner
    got = SparseVDiT(mode="multi_diagonal", density=0.3, block_size=16).attend(call, BACKEND)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert method.mask(grid, "diagonal").computed == method.mask(grid, "multi_diagonal").computed


def test_all_full_is_dense_and_all_skip_is_zero() -> None:
    call = call_of(TokenGrid(3, 5, 7, 0, 4))
    assert torch.equal(SparseVDiT(mode="full").attend(call, BACKEND), BACKEND.dense(call))
    assert int(SparseVDiT(mode="skip").attend(call, BACKEND).count_nonzero()) == 0


def test_heads_in_any_grouping_give_the_same() -> None:
    grid = TokenGrid(4, 8, 8)
    call = call_of(grid, heads=5)
    modes = ("stripe", "full", "diagonal", "skip", "diagonal")
    mixed = SparseVDiT(mode=modes, density=0.3, block_size=16)
    out = mixed.attend(call, BACKEND)
    for head, mode in enumerate(modes):
        alone = SparseVDiT(mode=mode, density=0.3, block_size=16).attend(
            call.heads([head]), BACKEND
        )
        torch.testing.assert_close(out[:, :, head], alone[:, :, 0], atol=1e-6, rtol=0)
    rules = expand_modes(modes, mixed)
    assert sorted(h for heads, _ in rules for h in heads) == [0, 1, 2, 3, 4]
    assert {rule.mode for _, rule in rules} == set(modes)
    assert mixed.not_supported(call_of(grid, heads=2)) == [
        "sparse_vdit lists 5 modes, the call has 2 heads"
    ]


def heads_of_every_kind(grid: TokenGrid) -> AttentionCall:
    """Five heads: frame-local, same place, one hot block, weak values, no structure."""
    place = grid.coordinates().float()
    total, width = grid.total, 64
    frame_code = torch.nn.functional.one_hot(place[:, 0].long(), width).float()
    spot_code = torch.nn.functional.one_hot((place[:, 1] * grid.width + place[:, 2]).long(), width)
    query, key = torch.zeros(1, total, 5, width), torch.zeros(1, total, 5, width)
    query[0, :, 0] = key[0, :, 0] = frame_code * 12
    query[0, :, 1] = key[0, :, 1] = spot_code.float() * 12
    query[0, :, 2, 0] = 12.0
    key[0, 16:32, 2, 0] = 12.0  # a block of the first frame
    value = torch.randn(1, total, 5, width) + 2
    value[:, :, 3] *= 1e-3
    value[:, :, 4] += (place.sum(1) - 10.5)[None, :, None] / 2  # frame, row and column all matter
    return AttentionCall(query, key, value, grid)


def test_the_chooser_finds_the_pattern_of_each_head() -> None:
    call = heads_of_every_kind(TokenGrid(8, 8, 8))
    method = SparseVDiT(density=0.25, block_size=16, penalty=0.01, threshold=0.1, skip=True)
    modes, out = choose_modes(call, BACKEND, method)
    assert modes == ("diagonal", "multi_diagonal", "stripe", "skip", "full")
    again = SparseVDiT(mode=modes, density=0.25, block_size=16).attend(call, BACKEND)
    torch.testing.assert_close(out, again, atol=1e-6, rtol=0)


def test_threshold_and_penalty_move_the_choice_as_the_paper_says() -> None:
    call = heads_of_every_kind(TokenGrid(8, 8, 8))

    def modes(**params: float) -> tuple[str, ...]:
        return choose_modes(call, BACKEND, SparseVDiT(block_size=16, skip=True, **params))[0]

    assert modes(threshold=0.0) == ("full",) * 5
    losses = mode_losses(call, BACKEND, SparseVDiT(block_size=16, skip=True))
    assert modes(threshold=1e9) == tuple(MODES[i] for i in losses.argmin(0).tolist())
    assert modes(threshold=1e9, penalty=1e6) == ("skip",) * 5
    full = [modes(threshold=t).count("full") for t in (0.0, 0.05, 0.2, 1.0, 5.0)]
    assert full == sorted(full, reverse=True)
    assert full[0] > full[-1]


def test_auto_chooses_once_per_site_and_keeps_to_it() -> None:
    grid = TokenGrid(8, 8, 8)
    call, method = heads_of_every_kind(grid), SparseVDiT(block_size=16, threshold=0.3)
    first = method.attend(call, BACKEND)
    (modes,) = call.memory.values()
    assert "skip" not in modes
    second = method.attend(call, BACKEND)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert sum(not key.startswith("heads ") for key in call.memory) == 1


def test_in_a_pipeline_full_is_stock_and_skip_leaves_the_bias_of_the_output_projection() -> None:
    pipe = tiny.build("wan")
    stock = generate(pipe, "wan")
    with attach(pipe, SparseVDiT(mode="full"), dense_steps=0, backend="reference"):
        assert torch.equal(generate(pipe, "wan"), stock)
    projected: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(layer: torch.nn.Module, given: object, out: torch.Tensor) -> None:
        projected.append((layer.get_parameter("bias"), out))

    hooks = [block.attn1.to_out[0].register_forward_hook(look) for block in pipe.transformer.blocks]
    skip = SparseVDiT(mode="skip")  # the flight recorder would bring such heads back
    with attach(pipe, skip, dense_steps=0, backend="reference", recorder=False):
        assert not torch.equal(generate(pipe, "wan"), stock)
    for hook in hooks:
        hook.remove()
    assert len(projected) >= 2 * len(hooks)
    for bias, out in projected:
        assert torch.equal(out, bias.expand_as(out))


def test_a_table_of_modes_survives_its_file_and_fits_no_other_model(tmp_path: Path) -> None:
    modes = ("stripe", "full", "diagonal", "skip", "diagonal")
    method = SparseVDiT(mode=modes, density=0.3, block_size=16)
    table = Plan(
        tuple(Rule(m, layers=(1,), heads=tuple(h)) for h, m in expand_modes(modes, method))
    )
    call = call_of(TokenGrid(4, 8, 8), heads=5)
    again = Plan.load(table.save(tmp_path / "modes.json"))
    assert again == table
    facts = ModelFacts("WanTransformer3DModel", layers=2, heads=5, head_dim=8)
    again.check(facts)
    for wrong in (replace(facts, heads=4), replace(facts, layers=1)):
        with pytest.raises(PlanError):
            again.check(wrong)
    out = torch.zeros_like(call.query)
    for heads, part in again.rules_for(1, "blocks.1.attn1", 0, 10, 5):
        out[:, :, list(heads)] = part.attend(call.heads(list(heads)), BACKEND)
    torch.testing.assert_close(out, method.attend(call, BACKEND), atol=1e-6, rtol=0)


def test_one_frame_has_one_diagonal_and_short_clips_are_dense() -> None:
    grid = TokenGrid(1, 20, 20)
    method = SparseVDiT(density=0.3, block_size=16)
    one, many = method.mask(grid, "diagonal"), method.mask(grid, "multi_diagonal")
    assert torch.equal(one.to_dense(), many.to_dense())
    short = call_of(TokenGrid(2, 8, 8))
    for mode in ("diagonal", "multi_diagonal"):
        wide = SparseVDiT(density=0.9, mode=mode)
        assert bool(wide.mask(short.grid).keep.all())
        assert torch.equal(wide.attend(short, BACKEND), BACKEND.dense(short))


def test_density_one_is_dense_and_stripes_use_the_given_columns() -> None:
    grid = TokenGrid(8, 8, 8)
    for mode in ("diagonal", "multi_diagonal", "stripe"):
        assert SparseVDiT(mode=mode, density=1.0, block_size=16).mask(grid).density == 1.0
    keep = SparseVDiT(mode="stripe", density=0.3, block_size=16, stripes=(0.5, 0.75, 0.9)).mask(
        grid
    )
    columns = keep.keep[0].all(0).nonzero().flatten().tolist()
    assert columns == [0, 1, 2, 3, 16, 24, 28]
    assert keep.density == pytest.approx(0.25, abs=0.05)


def test_bad_modes_are_refused() -> None:
    with pytest.raises(InputError, match=r"sparse_vdit: mode .* 'auto', or one of full, skip"):
        SparseVDiT(mode="vertical")
    with pytest.raises(InputError, match="shares from 0 to 1"):
        SparseVDiT(stripes=(3.0,))
