"""Grids, segments, orders and tiled masks against their token-by-token meaning."""

import pickle
from itertools import product

import pytest
import torch

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.mask import BlockMask, pack_bits, unpack_bits
from dittools.methods.curves import block_order, gilbert
from dittools.order import TokenOrder
from dittools.tiling import offset_mask, separable_mask, tile_shape

GRIDS = [
    TokenGrid(1, 1, 1),
    TokenGrid(3, 4, 5),
    TokenGrid(2, 3, 7, 5, 0),
    TokenGrid(4, 5, 3, 0, 9),
    TokenGrid(2, 6, 6, 3, 4),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_coordinates_are_raster_with_text_around(grid: TokenGrid) -> None:
    places = grid.coordinates().tolist()
    video = [list(place) for place in product(*(range(n) for n in grid.shape))]
    text = [[-1, -1, -1]]
    assert places == text * grid.text_before + video + text * grid.text_after
    assert (grid.tokens, grid.total) == (len(video), len(places))
    assert grid.blocks(7) == -(-len(places) // 7)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_segments_cover_every_token_once(grid: TokenGrid, block: int) -> None:
    seg, token = grid.segments(block), 0
    frames = grid.coordinates()[:, 0].tolist()
    for number, frame, first, last in zip(*(part.tolist() for part in seg), strict=True):
        for place in range(first, last + 1):
            assert token // block == number
            assert frames[token] == frame
            if frame >= 0:
                inside = token - grid.text_before - frame * grid.tokens_per_frame
                assert inside == place
            token += 1
    assert token == grid.total


def test_grids_are_keys_and_refuse_what_is_not_a_size() -> None:
    assert len({TokenGrid(1, 2, 3), TokenGrid(1, 2, 3), TokenGrid(1, 2, 3, 1)}) == 2
    assert pickle.loads(pickle.dumps(GRIDS[2])) == GRIDS[2]
    for bad in ((0, 1, 1), (1, 1.5, 1), (1, 1, 1, -1), (True, 1, 1)):
        with pytest.raises(
            InputError, match=r"TokenGrid \w+ is not usable; expected a whole number"
        ):
            TokenGrid(*bad)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 2), (1, 4, 4), (3, 1, 5)])
def test_tiles_put_neighbours_into_one_block(grid: TokenGrid, tile: tuple[int, int, int]) -> None:
    order = TokenOrder.tiles(grid, tile)
    assert order.is_valid()
    size = tile[0] * tile[1] * tile[2]
    assert order.slots % size == 0
    places = grid.coordinates() // torch.tensor(tile)
    for block in order.index[0].view(-1, size):
        inside = places[block[block >= 0]]
        assert len(inside) == 0 or bool((inside == inside[0]).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_orders_undo_themselves_and_padding_holds_zeros(grid: TokenGrid) -> None:
    x = torch.randn(2, grid.total + 3, 2, 4)  # three extra keys stay behind
    for order in (
        TokenOrder.tiles(grid, (2, 2, 2)),
        block_order(grid, 8),
        TokenOrder.identity(grid.total),
    ):
        moved = order.apply(x)
        assert torch.equal(moved[:, order.slots :], x[:, grid.total :])
        assert torch.equal(order.undo(moved[:, : order.slots]), x[:, : grid.total])
        holes = moved[:, : order.slots][:, order.index[0] < 0]
        assert int(holes.count_nonzero()) == 0
    heads = torch.stack([torch.randperm(grid.total), torch.randperm(grid.total)])
    order = TokenOrder(heads, grid.total)
    moved = order.apply(x[:, : grid.total])
    assert torch.equal(moved[:, :, 1], x[:, heads[1], 1])
    assert torch.equal(order.undo(moved), x[:, : grid.total])


def test_bits_survive_packing_even_when_there_are_none() -> None:
    for shape in ((3, 5, 13), (2, 16), (0, 4, 8), (0, 4, 5)):
        bits = torch.rand(shape) < 0.4
        assert torch.equal(unpack_bits(pack_bits(bits), shape[-1]), bits)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [(1, 2, 4), (2, 2, 2), (1, 1, 8)])
def test_separable_masks_are_the_product_of_their_axes(
    grid: TokenGrid, tile: tuple[int, int, int]
) -> None:
    axes = tuple(torch.rand(n, n) < 0.5 for n in grid.shape)
    places = grid.coordinates()
    text = places[:, 0] < 0
    expected = torch.ones((grid.total, grid.total), dtype=torch.bool)
    for axis, pattern in enumerate(axes):
        place = places[:, axis].clamp(min=0)
        expected &= pattern[place][:, place]
    expected |= text | text[:, None]
    mask = separable_mask(grid, (axes[0], axes[1], axes[2]), tile)
    assert torch.equal(mask.to_dense()[0], expected)
    assert mask.density == pytest.approx(float(expected.float().mean()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [(2, 4), (4, 4), (1, 8)])
@pytest.mark.parametrize("extra", [0, 5])
def test_offset_masks_depend_on_the_offset_alone(
    grid: TokenGrid, tile: tuple[int, int], extra: int
) -> None:
    allowed = torch.rand(2 * grid.height - 1, 2 * grid.width - 1) < 0.4
    places = grid.coordinates()
    apart = places - places[:, None]
    text = places[:, 0] < 0
    seen = allowed[
        (apart[..., 1] + grid.height - 1).clamp(0, 2 * grid.height - 2),
        (apart[..., 2] + grid.width - 1).clamp(0, 2 * grid.width - 2),
    ]
    expected = seen | text | text[:, None]
    tail = (~text)[:, None].expand(-1, extra)
    mask = offset_mask(grid, allowed, tile, extra)
    expected = torch.cat((expected, tail), dim=1)
    assert torch.equal(mask.to_dense()[0], expected)
    assert mask.density == pytest.approx(float(expected.float().mean()))


def test_dense_masks_survive_blocking() -> None:
    for tokens, block in product((1, 15, 40), (4, 16)):
        dense = torch.rand(2, tokens, tokens) < 0.3
        mask = BlockMask.from_dense(dense, block)
        assert torch.equal(mask.to_dense(), dense)
        assert mask.density == pytest.approx(float(dense.float().mean()))
        assert mask.computed >= mask.density - 1e-6


def test_tile_shapes_hold_the_block_and_pad_least() -> None:
    for grid in GRIDS:
        tile = tile_shape(grid, 64)
        assert tile[0] * tile[1] * tile[2] == 64
    assert tile_shape(TokenGrid(8, 16, 16), 64) == (4, 4, 4)
    assert tile_shape(TokenGrid(1, 32, 32), 64) == (1, 8, 8)


@pytest.mark.parametrize("shape", [(4, 8, 9), (5, 7, 3), (2, 2, 11)])
def test_the_curve_covers_odd_boxes(shape: tuple[int, int, int]) -> None:
    order = gilbert(*shape)
    assert torch.equal(order.sort().values, torch.arange(shape[0] * shape[1] * shape[2]))


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((1, 5, 2), [0, 1, 3, 2, 4, 6, 5, 7, 9, 8]),
        ((2, 3, 3), [0, 9, 10, 1, 4, 13, 12, 3, 6, 7, 15, 16, 17, 8, 5, 14, 11, 2]),
        ((4, 2, 3), [0, 3, 9, 6, 7, 10, 4, 1, 2, 5, 11, 8, 14, 17, 23, 20, 19, 22, 16, 13, 12, 15,
                     21, 18]),
        ((3, 4, 2), [0, 2, 3, 1, 9, 11, 10, 8, 16, 17, 19, 18, 20, 21, 23, 22, 14, 12, 13, 15, 7, 5,
                     4, 6]),
    ],
)  # fmt: skip
def test_the_curve_is_the_published_one(shape: tuple[int, int, int], tokens: list[int]) -> None:
    """Of jakubcerveny/gilbert, which starts along the longest side."""
    assert gilbert(*shape).tolist() == tokens
