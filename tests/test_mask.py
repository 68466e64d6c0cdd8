"""BlockMask, TokenOrder and the tile builder, against their token-by-token definitions."""

import random
import warnings

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from torch.nn.attention.flex_attention import flex_attention

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.kernels.common import from_slots, to_slots
from dittools.mask import DENSE_LIMIT, BlockMask, pack_bits, unpack_bits
from dittools.order import TokenOrder
from dittools.tiling import separable_mask, tile_shape


def cut_mask(heads: int = 2, q_tokens: int = 50, kv_tokens: int = 70) -> BlockMask:
    """Return a mask with whole, cut and dropped blocks and ragged tails on both sides."""
    dense = torch.rand(heads, q_tokens, kv_tokens) < 0.1
    dense[:, :16, :32] = True
    dense[:, 16:32] = False
    dense[0, 32:48, 48:64] = True
    dense[:, 48:, 64:] = True  # the tail of both, whole
    return BlockMask.from_dense(dense, 16)


# ---- bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64])
def test_bits_survive_packing(length: int) -> None:
    bits = torch.rand(3, 5, length) < 0.5
    packed = pack_bits(bits)
    assert packed.shape == (3, 5, -(-length // 8))
    assert torch.equal(unpack_bits(packed, length), bits)


def test_lowest_bit_is_the_first_key() -> None:
    bits = torch.zeros(1, 16, dtype=torch.bool)
    bits[0, [0, 3, 9]] = True
    assert pack_bits(bits).tolist() == [[0b1001, 0b10]]


# ---- BlockMask ---------------------------------------------------------------------------------


def test_from_dense_gives_the_same_tokens_back() -> None:
    for heads, q_tokens, kv_tokens, block in ((1, 1, 1, 8), (2, 50, 70, 16), (3, 64, 64, 32)):
        dense = torch.rand(heads, q_tokens, kv_tokens) < 0.2
        assert torch.equal(BlockMask.from_dense(dense, block).to_dense(), dense)


def test_from_dense_counts_a_whole_ragged_tail_as_whole() -> None:
    mask = BlockMask.from_dense(torch.ones(1, 50, 70, dtype=torch.bool), 16)
    assert mask.tiles is None
    assert mask.keep.all()


def test_from_dense_stores_equal_tiles_once() -> None:
    tile = torch.rand(16, 16) < 0.5
    mask = BlockMask.from_dense(tile.repeat(3, 4)[None], 16)
    assert mask.tiles is not None
    assert mask.tile_index is not None
    assert mask.tiles.shape == (1, 16, 2)
    assert (mask.tile_index == 0).all()


def test_from_dense_refuses_long_sequences() -> None:
    long = torch.ones(1, 1, 1, dtype=torch.bool).expand(1, 4, DENSE_LIMIT + 1)
    with pytest.raises(UnsupportedCall, match=f"at most {DENSE_LIMIT} tokens.*{DENSE_LIMIT + 1}"):
        BlockMask.from_dense(long, 64)


def test_density_is_the_share_of_kept_pairs() -> None:
    mask = cut_mask()
    assert mask.density == pytest.approx(float(mask.to_dense().double().mean()), abs=1e-12)
    per_head = mask.to_dense().double().mean(dim=(1, 2))
    assert torch.allclose(mask.head_density(), per_head, atol=1e-12)
    assert mask.computed > mask.density


def test_density_without_bit_tiles_is_the_share_of_blocks() -> None:
    keep = torch.zeros(2, 4, 5, dtype=torch.bool)
    keep[0, 0] = True
    mask = BlockMask(keep, 16)
    assert mask.density == mask.computed == 5 / 40
    assert mask.head_density().tolist() == [0.25, 0.0]


def test_density_counts_tokens_not_padding_slots() -> None:
    grid = TokenGrid(2, 3, 5, text_before=2)
    every = tuple(torch.ones(side, side, dtype=torch.bool) for side in grid.shape)
    mask = separable_mask(grid, every, (2, 2, 4))
    assert mask.order is not None
    assert mask.order.has_padding
    assert mask.density == pytest.approx(1.0)


def test_lists_are_whole_blocks_then_cut_ones() -> None:
    mask = cut_mask()
    lists = mask.lists()
    heads, q_blocks, _ = mask.keep.shape
    assert mask.tile_index is not None
    assert len(lists.indptr) == heads * q_blocks + 1
    assert int(lists.indptr[-1]) == int(mask.keep.sum())
    for row in range(heads * q_blocks):
        head, q_block = divmod(row, q_blocks)
        first, last = lists.indptr[row : row + 2].tolist()
        middle = int(lists.full_end[row])
        tile = mask.tile_index[head, q_block]
        kept = mask.keep[head, q_block]
        whole = (kept & (tile < 0)).nonzero().flatten().tolist()
        cut = (kept & (tile >= 0)).nonzero().flatten().tolist()
        assert lists.block[first:middle].tolist() == whole
        assert lists.block[middle:last].tolist() == cut
        assert (lists.tile[first:middle] == -1).all()
        assert lists.tile[middle:last].tolist() == tile[cut].tolist()
    assert int((lists.tile >= 0).sum()) > 0
    assert (lists.indptr.diff() == 0).any()


def test_lists_are_made_once() -> None:
    mask = cut_mask()
    assert mask.lists() is mask.lists()


def test_full_keeps_every_pair() -> None:
    mask = BlockMask.full(50, 70, 16)
    assert mask.to_dense().shape == (1, 50, 70)
    assert mask.to_dense().all()


def test_from_segments_keeps_a_block_when_any_pair_is_kept() -> None:
    for seed in range(20):
        pick = random.Random(seed)
        grid = TokenGrid(*(pick.randint(1, 4) for _ in range(3)), pick.choice([0, 3]), 2)
        block = pick.choice([3, 8])
        segments = grid.segments(block)
        count = len(segments.block)
        kept = torch.rand((count, count), generator=torch.Generator().manual_seed(seed)) < 0.2
        mask = BlockMask.from_segments(grid, segments, kept, block)
        want = torch.zeros(grid.blocks(block), grid.blocks(block), dtype=torch.bool)
        for i in range(count):
            for j in range(count):
                text = segments.frame[i] < 0 or segments.frame[j] < 0
                if kept[i, j] or text:
                    want[segments.block[i], segments.block[j]] = True
        assert torch.equal(mask.keep[0], want), f"seed {seed}"


def test_segments_cover_every_token_once() -> None:
    grid = TokenGrid(3, 4, 5, text_before=7, text_after=2)
    segments = grid.segments(8)
    place = grid.coordinates()
    lengths = segments.last - segments.first + 1
    assert int(lengths.sum()) == grid.total
    token = 0
    for block, frame, first, last in zip(*segments, strict=True):
        for inside in range(int(first), int(last) + 1):
            assert token // 8 == block
            assert place[token, 0] == frame
            if frame >= 0:
                assert place[token, 1] * grid.width + place[token, 2] == inside
            token += 1


def test_heads_picks_masks_and_orders() -> None:
    mask = cut_mask(heads=3)
    assert torch.equal(mask.heads([2, 0]).to_dense(), mask.to_dense()[[2, 0]])
    shared = BlockMask.full(32, 32, 16)
    assert shared.heads([4, 5]) is shared
    order = TokenOrder(torch.stack([torch.randperm(32) for _ in range(3)]), 32)
    block_diagonal = BlockMask(torch.eye(2, dtype=torch.bool)[None], 16, order=order)
    assert torch.equal(block_diagonal.heads([1]).to_dense(), block_diagonal.to_dense()[[1]])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"keep": torch.ones(2, 2, dtype=torch.bool)}, r"malformed.*\(2, 2\)"),
        ({"keep": torch.ones(1, 2, 2)}, "malformed.*float32"),
        ({"block_size": 0}, "positive block size"),
        ({"q_tokens": 40}, "q_tokens.*3 blocks of 16 for 40 tokens.*got 2"),
        ({"kv_tokens": 16}, "kv_tokens.*1 blocks of 16 for 16 tokens.*got 2"),
        ({"tiles": torch.zeros(1, 16, 2, dtype=torch.uint8)}, "together"),
        ({"order": TokenOrder.identity(64)}, "token order.*4 query blocks.*got 2"),
    ],
)
def test_malformed_masks_are_refused(options: dict[str, object], problem: str) -> None:
    arguments = {"keep": torch.ones(1, 2, 2, dtype=torch.bool), "block_size": 16, **options}
    with pytest.raises(UnsupportedCall, match=problem):
        BlockMask(**arguments)


# ---- TokenOrder --------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [0, 9])
@pytest.mark.parametrize("heads", [1, 3])
def test_order_and_its_inverse_meet(holes: int, heads: int) -> None:
    index = torch.full((heads, 40 + holes), -1)
    for row in index:
        row[torch.randperm(40 + holes)[:40]] = torch.randperm(40)
    order = TokenOrder(index, 40)
    assert order.is_valid()
    assert order.has_padding == (holes > 0)
    tensor = torch.randn(2, 45, 3, 4)  # five extra keys stay behind
    moved = order.apply(tensor)
    assert moved.shape == (2, 45 + holes, 3, 4)
    for h in range(3):
        for slot, token in enumerate(index[min(h, heads - 1)].tolist()):
            want = tensor[:, token, h] if token >= 0 else torch.zeros(2, 4)
            assert torch.equal(moved[:, slot, h], want)
    assert torch.equal(moved[:, 40 + holes :], tensor[:, 40:])
    assert torch.equal(order.undo(moved[:, : 40 + holes]), tensor[:, :40])


def test_damaged_orders_are_seen() -> None:
    assert TokenOrder.identity(8).is_valid()
    assert not TokenOrder(torch.zeros(1, 8, dtype=torch.int64), 8).is_valid()
    with pytest.raises(UnsupportedCall, match="at least 8 slots"):
        TokenOrder(torch.arange(7)[None], 8)


def test_tiles_hold_neighbours() -> None:
    grid = TokenGrid(3, 4, 5, text_before=3, text_after=2)
    tile = (2, 2, 2)
    order = TokenOrder.tiles(grid, tile)
    assert order.is_valid()
    assert order.slots % 8 == 0
    place = grid.coordinates()
    blocks = order.index[0].view(-1, 8)
    grid_blocks = 2 * 2 * 3
    for block in blocks[:grid_blocks]:
        corners = place[block[block >= 0]] // torch.tensor(tile)
        assert len(corners) > 0
        assert (corners == corners[0]).all()
    text = blocks[grid_blocks:].flatten()
    assert text[text >= 0].tolist() == [0, 1, 2, 63, 64]


def test_tile_shape_fills_the_block_and_avoids_padding() -> None:
    assert tile_shape(TokenGrid(4, 8, 8), 64) == (4, 4, 4)
    assert tile_shape(TokenGrid(1, 16, 16), 64) == (1, 8, 8)
    f, h, w = tile_shape(TokenGrid(5, 12, 12), 64)
    assert f * h * w == 64


# ---- masks that factor over the axes -----------------------------------------------------------


def brute_force(grid: TokenGrid, axes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    place = grid.coordinates()
    text = place[:, 0] < 0
    kept = torch.ones(grid.total, grid.total, dtype=torch.bool)
    for axis, allowed in enumerate(axes):
        at = place[:, axis].clamp(min=0)
        kept &= allowed[at][:, at]
    return kept | text | text[:, None]


@pytest.mark.parametrize("seed", range(30))
def test_separable_mask_is_exact_to_the_token(seed: int) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    grid = TokenGrid(
        *(pick.randint(1, 6) for _ in range(3)), pick.choice([0, 0, 5]), pick.choice([0, 3, 20])
    )
    tile = tuple(pick.choice([1, 2, 3, 4]) for _ in range(3))
    share = pick.choice([0.3, 0.7, 1.0])
    axes = tuple(torch.rand(side, side) < share for side in grid.shape)
    mask = separable_mask(grid, axes, tile)
    want = brute_force(grid, axes)
    assert torch.equal(mask.to_dense()[0], want)
    assert mask.density == pytest.approx(float(want.double().mean()), abs=1e-12)


def test_separable_mask_runs_exactly_on_the_reference() -> None:
    grid = TokenGrid(3, 5, 4, text_before=2, text_after=3)
    axes = tuple(torch.rand(side, side) < 0.6 for side in grid.shape)
    mask = separable_mask(grid, axes, (2, 2, 4))
    q, k, v = (torch.randn(1, grid.total, 2, 16, dtype=torch.float64) for _ in range(3))
    call = AttentionCall(q, k, v, grid)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=brute_force(grid, axes)
    )
    out = load("reference").block_sparse(call, mask)
    assert float((out - want.transpose(1, 2)).abs().max()) < 1e-12


# ---- FlexAttention -----------------------------------------------------------------------------


def flex_masks() -> list[tuple[str, TokenGrid, BlockMask]]:
    torch.manual_seed(0)
    grid = TokenGrid(3, 5, 4, text_before=2, text_after=3)
    axes = tuple(torch.rand(side, side) < 0.6 for side in grid.shape)
    line = TokenGrid(1, 1, 50)
    holes = torch.full((2, 60), -1)
    for row in holes:
        row[torch.randperm(60)[:50]] = torch.randperm(50)
    random_blocks = torch.rand(2, 4, 4) < 0.5
    random_blocks[:, :, 0] = True
    per_head = BlockMask(
        random_blocks[:1], 16, order=TokenOrder(holes, 50), q_tokens=50, kv_tokens=50
    )
    dense = torch.rand(2, 50, 50) < 0.2
    dense[:, 0] = True
    return [
        ("tiles, text, padding", grid, separable_mask(grid, axes, (2, 2, 4))),
        ("cut blocks", line, BlockMask.from_dense(dense | torch.eye(50, dtype=torch.bool), 16)),
        ("blocks", line, BlockMask(random_blocks, 16, q_tokens=50, kv_tokens=50)),
        ("an order per head", line, per_head),
    ]


FLEX_MASKS = flex_masks()


@pytest.mark.parametrize("which", range(len(FLEX_MASKS)), ids=[name for name, _, _ in FLEX_MASKS])
def test_flex_attention_with_the_mask_equals_the_reference(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, grid, mask = FLEX_MASKS[which]
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    q, k, v = (torch.randn(1, grid.total, 2, 20) for _ in range(3))
    call = AttentionCall(q, k, v, grid)
    slots, flex = to_slots(call, mask), mask.to_flex()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # eager flex warns that it is slow
        out = flex_attention(slots.query, slots.key, slots.value, block_mask=flex)
    want = load("reference").block_sparse(call, mask)
    assert float((from_slots(out, mask) - want).abs().max()) < 1e-5
    heads = flex.kv_num_blocks.shape[1]
    assert torch.equal(flex.to_dense()[0].bool(), mask.keep.expand(heads, -1, -1))


def test_flex_full_blocks_are_those_without_a_bit_tile() -> None:
    mask = cut_mask()
    flex = mask.to_flex()
    assert mask.tile_index is not None
    whole = mask.keep & (mask.tile_index < 0)
    assert torch.equal(flex.full_kv_num_blocks[0].long(), whole.sum(-1))
    assert torch.equal(flex.kv_num_blocks[0].long(), (mask.keep & ~whole).sum(-1))
    first = flex.full_kv_indices[0, 0, 0, : int(whole[0, 0].sum())]
    assert first.tolist() == whole[0, 0].nonzero().flatten().tolist()
