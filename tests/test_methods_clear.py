"""CLEAR: the disk token by token, its published FLOPs, pooled keys, and the weight loader."""

import math

import pytest
import torch
from torch import nn

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.auto import AutoBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.clear import Clear, clear_pairs
from dittools.methods.clear_weights import load_clear, trained_names
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch

BACKEND = ReferenceBackend()


def disk(grid: TokenGrid, radius: float) -> torch.Tensor:
    """The mask by definition: strict distance, cut at the border, text dense."""
    place = grid.coordinates()
    apart = (place[:, None] - place)[..., 1:].square().sum(-1)
    text = place[:, 0] < 0
    return (apart < radius**2) | text | text[:, None]


def call_of(grid: TokenGrid, batch: int = 1) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, 2, 8) for _ in range(3))
    return AttentionCall(q, k, v, grid)


@pytest.mark.parametrize(
    ("radius", "tokens"), [(1, 1), (2, 9), (3, 25), (4, 45), (8, 193), (16, 793)]
)
def test_a_disk_holds_the_published_number_of_tokens(radius: int, tokens: int) -> None:
    grid = TokenGrid(1, 33, 33)
    middle = 16 * 33 + 16
    assert int(Clear(radius=radius).mask(grid).to_dense()[0, middle].sum()) == tokens


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(1, 8, 12, 5),
        TokenGrid(1, 13, 7, 0, 9),
        TokenGrid(1, 5, 5),
        TokenGrid(3, 6, 10, 4, 3),
        TokenGrid(1, 2, 40),
    ],
    ids=str,
)
def test_the_mask_is_the_disk_on_any_grid(grid: TokenGrid, block: int) -> None:
    for radius in (1, 2.5, 3, 5):
        mask = Clear(radius=radius, block_size=block).mask(grid)
        expected = disk(grid, radius)
        assert torch.equal(mask.to_dense()[0], expected)
        assert mask.density == pytest.approx(float(expected.float().mean()))
        assert clear_pairs(grid, radius) == int(expected.sum())


def test_the_boundary_is_strict_and_extremes_are_self_and_dense() -> None:
    grid = TokenGrid(1, 9, 9)
    dense = Clear(radius=3).mask(grid).to_dense()[0].view(9, 9, 9, 9)
    assert not bool(dense[4, 4, 4, 7])  # at distance exactly 3
    assert bool(dense[4, 4, 4, 6])
    assert torch.equal(Clear(radius=1).mask(grid).to_dense()[0], torch.eye(81, dtype=torch.bool))
    assert Clear(radius=13).mask(grid).density == 1.0
    small = Clear(radius=3).mask(TokenGrid(1, 8, 12, 5))
    assert int(small.to_dense().sum()) == 2821


@pytest.mark.parametrize(
    ("side", "dense", "local", "down"),
    [  # GFLOP per layer at r = 8, 16, 32, and r = 8 with pooled keys
        (64, 260.9, (63.5, 86.6, 154.1), 76.4),
        (128, 3507.9, (246.2, 352.6, 724.3), 452.4),
        (256, 53604.4, (979.3, 1433.2, 3141.7), 4277.8),
        (512, 847727, (3915, 5789, 13085), 56692),
    ],
)
def test_flops_are_the_published_table(
    side: int, dense: float, local: tuple[float, float, float], down: float
) -> None:
    grid = TokenGrid(1, side, side, 512)

    def giga(pairs: int) -> float:
        return 4 * pairs * 3072 / 1e9

    assert giga(grid.total**2) == pytest.approx(dense, rel=1e-3)
    assert [giga(clear_pairs(grid, r)) for r in (8, 16, 32)] == pytest.approx(local, rel=1e-3)
    assert giga(clear_pairs(grid, 8, 4)) == pytest.approx(down, rel=1e-3)
    if side <= 128:
        mask = Clear(radius=8).mask(grid)
        assert mask.density * grid.total**2 == pytest.approx(clear_pairs(grid, 8))


@pytest.mark.parametrize(
    ("side", "radius", "visited"), [(64, 8, 0.215), (64, 16, 0.332), (128, 16, 0.099)]
)
def test_tiles_visit_the_expected_share_of_blocks(side: int, radius: int, visited: float) -> None:
    mask = Clear(radius=radius).mask(TokenGrid(1, side, side))
    assert mask.computed == pytest.approx(visited, abs=6e-4)


def test_attention_is_sdpa_under_the_disk_and_text_rows_are_dense() -> None:
    grid = TokenGrid(2, 7, 9, 4, 3)
    call = call_of(grid, batch=2)
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=disk(grid, 3))
    for block in (16, 32):
        got = Clear(radius=3, block_size=block).attend(call, BACKEND)
        torch.testing.assert_close(got, expected.transpose(1, 2), atol=3e-6, rtol=1e-5)
    dense = BACKEND.dense(call)
    torch.testing.assert_close(got[:, :4], dense[:, :4], atol=3e-6, rtol=1e-5)


def test_fine_tuned_weights_get_their_disk_where_dense_would_be_faster() -> None:
    grid = TokenGrid(1, 12, 12, 4)
    call = call_of(grid)
    window, dense = Clear(radius=3).attend(call, BACKEND), BACKEND.dense(call)
    for fine_tuned, expected in ((False, dense), (True, window)):
        meter = Meter(AutoBackend(), call, lambda: dense, Stopwatch())
        got = Clear(radius=3, fine_tuned=fine_tuned).attend(call, meter)
        torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)
        assert meter.was_sparse == fine_tuned
        assert meter.declined != fine_tuned


@pytest.mark.parametrize("text", [(5, 0), (0, 6), (3, 2)])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pooled_keys_are_seen_by_images_and_not_by_text(factor: int, text: tuple[int, int]) -> None:
    grid = TokenGrid(1, 8, 12, *text)
    weights = torch.softmax(torch.randn(factor * factor), 0)
    method = Clear(
        radius=2, down_factor=factor, spatial_weights=tuple(weights.tolist()), block_size=16
    )
    call = call_of(grid)
    inside = slice(text[0], text[0] + 96)

    def pool(x: torch.Tensor) -> torch.Tensor:
        cells = []
        for top in range(0, 8, factor):
            for left in range(0, 12, factor):
                cell = x[:, inside].view(1, 8, 12, 2, 8)[
                    :, top : top + factor, left : left + factor
                ]
                cells.append((cell.reshape(1, -1, 2, 8) * weights[:, None, None]).sum(1))
        return torch.stack(cells, dim=1)

    keys, values = (
        torch.cat((call.key, pool(call.key)), 1),
        torch.cat((call.value, pool(call.value)), 1),
    )
    allowed = torch.zeros((grid.total, keys.shape[1]), dtype=torch.bool)
    allowed[:, : grid.total] = disk(grid, 2)
    allowed[inside, grid.total :] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        call.query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=allowed
    )
    torch.testing.assert_close(
        method.attend(call, BACKEND), expected.transpose(1, 2), atol=3e-6, rtol=1e-5
    )
    assert method.mask(grid).density == pytest.approx(float(allowed.float().mean()))
    assert int(allowed.sum()) == clear_pairs(grid, 2, factor)


def test_pooling_a_constant_returns_it_and_refuses_broken_cells() -> None:
    call = call_of(TokenGrid(1, 8, 12))
    constant = AttentionCall(call.query, call.key, torch.full_like(call.value, 0.7), call.grid)
    out = Clear(radius=2, down_factor=4).attend(constant, BACKEND)
    torch.testing.assert_close(out, torch.full_like(out, 0.7))
    reasons = Clear(down_factor=4).not_supported(call_of(TokenGrid(1, 9, 12)))
    assert reasons == ["clear pools cells of 4 x 4, the grid is 9 x 12"]


def test_proportional_attention_scales_by_the_log_of_the_keys() -> None:
    call = call_of(TokenGrid(1, 12, 12))
    factor = math.sqrt(math.log(144) / math.log(4608))
    scaled = AttentionCall(call.query * factor, call.key, call.value, call.grid)
    torch.testing.assert_close(
        Clear(radius=4, proportional=True).attend(call, BACKEND),
        Clear(radius=4).attend(scaled, BACKEND),
        atol=2e-6,
        rtol=1e-5,
    )
    same = Clear(radius=4, proportional=True, trained_tokens=144).attend(call, BACKEND)
    torch.testing.assert_close(same, Clear(radius=4).attend(call, BACKEND), atol=1e-6, rtol=1e-6)


class Attention(nn.Module):
    def __init__(self, double: bool) -> None:
        super().__init__()
        names = ["to_q", "to_k", "to_v"] + (
            ["add_q_proj", "add_k_proj", "to_add_out"] if double else []
        )
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        if double:
            self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])


class Block(nn.Module):
    def __init__(self, double: bool) -> None:
        super().__init__()
        self.attn = Attention(double)
        if not double:
            self.proj_out = nn.Linear(4, 4)


class FluxShaped(nn.Module):
    """The parameter names of a FLUX transformer: 19 double and 38 single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(True) for _ in range(19))
        self.single_transformer_blocks = nn.ModuleList(Block(False) for _ in range(38))


def test_loader_takes_the_380_names_and_unloads_to_the_bit() -> None:
    module = FluxShaped()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    names = trained_names(module)
    assert len(names) == 380
    weights = {name: torch.randn(before[name].shape) for name in names}
    for i in range(38):
        prefix = "single_transformer_blocks" if i >= 19 else "transformer_blocks"
        name = f"{prefix}.{i % 19}.attn.processor.spatial_weight"
        weights[name] = torch.full((4, 4), float(i))
    handle = load_clear(module, weights)
    for name, p in module.named_parameters():
        assert torch.equal(p, weights[name] if name in weights else before[name]), name
    assert [w[0] for w in handle.spatial] == [float(i) for i in range(38)]
    assert Clear(down_factor=4, spatial_weights=handle.spatial[3]).spatial_weights == (3.0,) * 16
    handle.unload()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_loader_refuses_other_weights_and_changes_nothing() -> None:
    module = FluxShaped()
    weights = {
        name: torch.zeros(dict(module.named_parameters())[name].shape)
        for name in trained_names(module)
    }
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    extra = {**weights, "transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(4, 4)}
    with pytest.raises(InputError, match=r"exactly its 380 .* 0 missing \(\), 1 unexpected"):
        load_clear(module, extra)
    short = dict(list(weights.items())[1:])
    with pytest.raises(InputError, match=r"1 missing \(transformer_blocks.0.attn.to_q.weight\)"):
        load_clear(module, short)
    with pytest.raises(InputError, match=r"another shape; expected \(4, 4\); got \(2, 4\)"):
        load_clear(module, {**weights, "transformer_blocks.3.attn.to_k.weight": torch.zeros(2, 4)})
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_spatial_weights_must_fit_the_cell() -> None:
    with pytest.raises(
        InputError, match="clear: spatial_weights is not usable; expected 16 numbers"
    ):
        Clear(down_factor=4, spatial_weights=(0.1, 0.2))
