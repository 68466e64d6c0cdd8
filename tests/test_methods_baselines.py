"""The baselines: SVG's two kinds of heads, SpargeAttn's selection, the oracle."""

import math
from dataclasses import replace

import pytest
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods.bands import band_width, exact_half_width
from dittools.methods.curves import block_order
from dittools.methods.oracle import OracleTopK
from dittools.methods.random_blocks import RandomBlocks
from dittools.methods.selection import keep_top, mass_counts, sums_before
from dittools.methods.sparge import Sparge, self_similarity, skip_far_below
from dittools.methods.svg import SVG, _rows_of

BACKEND = ReferenceBackend()


def random_call(grid: TokenGrid, heads: int = 2, batch: int = 1) -> AttentionCall:
    return AttentionCall(*(torch.randn(batch, grid.total, heads, 16) for _ in range(3)), grid)


def two_kinds(grid: TokenGrid) -> AttentionCall:
    """Head 0 looks inside its frame, head 1 at its place in all frames."""
    place = grid.coordinates()
    query = torch.zeros(1, grid.total, 2, 64)
    token = torch.arange(grid.total)
    query[0, token, 0, place[:, 0]] = 12.0
    query[0, token, 1, place[:, 1] * grid.width + place[:, 2]] = 12.0
    return AttentionCall(query, query, torch.randn(1, grid.total, 2, 64), grid)


def test_svg_tells_spatial_from_temporal_heads() -> None:
    call = two_kinds(TokenGrid(8, 8, 8))
    method = SVG(density=0.25, sink=False, block_size=16, rows=16)
    assert method.temporal_heads(call).tolist() == [False, True]
    swapped = call.heads([1, 0])
    assert method.temporal_heads(swapped).tolist() == [True, False]
    out, dense = method.attend(call, BACKEND), BACKEND.dense(call)
    assert float((out - dense).abs().max()) < 1e-3


@pytest.mark.parametrize("text", [(0, 0), (5, 6)])
def test_svg_runs_the_bands_it_tested(text: tuple[int, int]) -> None:
    grid = TokenGrid(6, 7, 8, *text)
    method = SVG(density=0.3, sink=False, block_size=16)
    for mask in method.masks(grid):
        tokens = torch.tensor([text[0], text[0] + 100, text[0] + 335])
        assert torch.equal(_rows_of(mask, tokens), mask.to_dense()[0][tokens])
    call = random_call(grid, heads=3)
    kind = method.temporal_heads(call)
    out = method.attend(call, BACKEND)
    for head in range(3):
        allowed = method.masks(grid)[int(kind[head])].to_dense()
        q, k, v = (
            x[:, :, head : head + 1].transpose(1, 2) for x in (call.query, call.key, call.value)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        torch.testing.assert_close(out[:, :, head], expected[:, 0], atol=3e-6, rtol=1e-5)


EXACT = [
    TokenGrid(4, 6, 7),
    TokenGrid(6, 9, 11, 5, 9),
    TokenGrid(3, 16, 16, 0, 37),
    TokenGrid(1, 9, 11, 5, 3),
    TokenGrid(9, 12, 8),
]


@pytest.mark.parametrize("band", ["ceil", "floor"])
@pytest.mark.parametrize("grid", EXACT, ids=str)
@pytest.mark.parametrize("block_size", [16, 40, 128])
def test_svgs_exact_bands_are_the_authors_token_by_token(
    grid: TokenGrid, block_size: int, band: str
) -> None:
    token = torch.arange(grid.total)
    for density, sink in ((0.1, False), (0.5, True), (0.8, False), (1.0, True)):
        video = max(density - 2 * grid.text / grid.total, 0)
        width = grid.total * (1 - math.sqrt(1 - video)) / 128
        apart = (token[:, None] - token).abs()
        seen = apart <= 128 * math.ceil(width) if band == "ceil" else apart < 128 * int(width)
        seen = seen | (apart == 0) | (token >= grid.tokens) | (token >= grid.tokens)[:, None]
        if sink:
            seen = seen | (token < grid.tokens_per_frame)
        method = SVG(density=density, sink=sink, block_size=block_size, band=band)
        for mask, by_position in zip(method.masks(grid), (False, True), strict=True):
            inner = token[: grid.tokens]
            if by_position:
                inner = inner.view(grid.frames, -1).t().reshape(-1)
            ends = token[: grid.text_before], token[grid.text_before + grid.tokens :]
            here = torch.cat((inner + grid.text_before, *ends))
            want = torch.zeros_like(seen)
            want[here[:, None], here] = seen
            assert torch.equal(mask.to_dense()[0], want)
            if mask.tiles is not None:  # whole blocks count a ragged tail whole
                assert mask.density == pytest.approx(float(want.double().mean()))
            some = torch.tensor([grid.text_before, grid.text_before + grid.tokens - 1])
            assert torch.equal(_rows_of(mask, some), want[some])


@pytest.mark.parametrize(
    ("grid", "density", "frames"),
    [
        (TokenGrid(21, 45, 80), 0.25, 2.8134665),
        (TokenGrid(21, 45, 80), 0.30, 3.4301394),
        (TokenGrid(33, 45, 80, 0, 256), 0.25, 4.3486941),
    ],
)
def test_svgs_widths_are_the_published_ones(grid: TokenGrid, density: float, frames: float) -> None:
    width = band_width(density, grid.total, grid.text)
    assert width / grid.tokens_per_frame == pytest.approx(frames, abs=5e-7)
    up, down = (exact_half_width(grid, density, rounding) for rounding in ("ceil", "floor"))
    assert up % 128 == 0
    assert up - 128 < width <= up
    assert (down + 1) % 128 == 0
    assert down + 1 <= width < down + 129


def test_svg_runs_its_exact_bands() -> None:
    grid = TokenGrid(6, 9, 11, 5, 9)
    method, call = SVG(density=0.5, block_size=64, band="ceil"), random_call(grid)
    kind = method.temporal_heads(call)
    out = method.attend(call, BACKEND)
    for head in range(2):
        allowed = method.masks(grid)[int(kind[head])].to_dense()
        q, k, v = (
            x[:, :, head : head + 1].transpose(1, 2) for x in (call.query, call.key, call.value)
        )
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        torch.testing.assert_close(out[:, :, head], want[:, 0], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("block_size", [32, 128])
def test_svg_keeps_the_density_asked_for_in_both_orders(block_size: int, sink: bool) -> None:
    grid = TokenGrid(12, 12, 12)
    spatial, temporal = SVG(density=0.3, sink=sink, block_size=block_size).masks(grid)
    assert torch.equal(spatial.keep, temporal.keep)  # one band, run in two orders
    step = 2 / grid.blocks(block_size)  # the next wider band keeps so much more at most
    assert spatial.density == pytest.approx(0.3, abs=step / 2 + 0.01)
    first = -(-grid.tokens_per_frame // block_size)
    assert bool(spatial.keep[:, :, :first].all()) == sink
    assert not bool(spatial.keep.all())
    token = temporal.order.index[0, :24]  # twelve frames of one place, then of the next
    assert token.tolist() == [144 * f for f in range(12)] + [144 * f + 1 for f in range(12)]


@pytest.mark.parametrize("grid", [TokenGrid(6, 7, 8, 5, 6), TokenGrid(12, 6, 5)], ids=str)
@pytest.mark.parametrize("rows", [64, 1000])
def test_svg_takes_the_band_with_the_smaller_error_on_its_sampled_rows(
    grid: TokenGrid, rows: int
) -> None:
    call = random_call(grid, heads=6)
    call = replace(call, query=call.query * 2)
    method = SVG(density=0.3, block_size=16, rows=rows)
    count = min(rows, grid.tokens)
    picked = [grid.text_before + (2 * i + 1) * grid.tokens // (2 * count) for i in range(count)]
    assert len(set(picked)) == count
    dense = BACKEND.dense(call)[:, picked]
    errors = [
        (BACKEND.block_sparse(call, mask)[:, picked] - dense).square().mean((0, 1, 3))
        for mask in method.masks(grid)
    ]
    wanted = errors[1] < errors[0]
    assert 0 < int(wanted.sum()) < 6
    assert torch.equal(method.temporal_heads(call), wanted)
    kept = torch.ones((1, grid.total), dtype=torch.bool)
    if grid.text_after:  # padded text keys take no part in the decision
        kept[:, -3:] = False
        value = call.value.clone()
        value[:, -3:] = 1e3
        masked = [replace(call, value=v, key_mask=kept) for v in (value, call.value)]
        assert torch.equal(*(method.temporal_heads(part) for part in masked))


def test_self_similarity_is_the_mean_of_all_pairwise_cosines() -> None:
    tensor = torch.randn(1, 24, 2, 8)
    tensor[:, 20:] = 0  # padding slots
    found = self_similarity(tensor, 20, 8)
    unit = torch.nn.functional.normalize(tensor[0, :20], dim=-1)
    for block, part in enumerate(unit.split(8)):
        pairs = torch.einsum("ihd,jhd->hij", part, part)
        torch.testing.assert_close(found[:, block], pairs.mean((1, 2)))


def test_sparge_ranks_like_blocks_and_keeps_unlike_ones() -> None:
    grid = TokenGrid(1, 8, 16)
    order = block_order(grid, 32, "raster")
    block = torch.arange(128) // 16
    centre = torch.randn(8, 2, 16) * 2
    q, k, v = centre[block][None], centre.flip(0)[block][None], torch.randn(1, 128, 2, 16)
    q = torch.randn(4, 2, 16)[torch.arange(128) // 32][None] * 2
    call = AttentionCall(q, k, v, grid)
    params = {"block_size": 32, "curve": "raster"}
    mask = Sparge(density=0.25, **params).select(call, order)
    pooled = torch.einsum("qhd,khd->hqk", q[0, ::32], k[0, ::16])
    assert torch.equal(mask.keep, keep_top(pooled, 2))
    everything = Sparge(density=0.25, similarity=1.0, **params)
    noisy = random_call(grid)
    assert bool(everything.select(noisy, order).keep.all())
    assert torch.equal(everything.attend(noisy, BACKEND), BACKEND.dense(noisy))
    keys = k.clone()
    keys[:, 32:48] = torch.randn(1, 16, 2, 16)  # one block of unlike keys
    mask = Sparge(density=0.25, similarity=0.6, **params).select(
        AttentionCall(q, keys, v, grid), order
    )
    assert bool(mask.keep[:, :, 2].all())


def test_sparge_with_like_tokens_is_pooled_top_p_and_with_orthogonal_ones_dense() -> None:
    grid = TokenGrid(1, 8, 16)
    order, token = block_order(grid, 32, "raster"), torch.arange(128)
    q = (torch.randn(4, 2, 16) * 2)[token // 32][None]
    k = (torch.randn(8, 2, 16) * 2)[token // 16][None]
    call = AttentionCall(q, k, torch.randn(1, 128, 2, 16), grid)
    similar = self_similarity(q, 128, 32), self_similarity(k, 128, 16)
    torch.testing.assert_close(torch.cat(similar, 1), torch.ones(2, 12))
    params = {"similarity": 0.99, "block_size": 32, "curve": "raster"}
    mask = Sparge(mass=0.8, **params).select(call, order)
    pooled = torch.einsum("qhd,khd->hqk", q[0, ::32], k[0, ::16]) / 4
    chance = pooled.softmax(-1)
    assert torch.equal(mask.keep, keep_top(chance, mass_counts(chance, 0.8).clamp(min=1)))
    tenth = Sparge(density=0.3, **params).select(call, order)  # 0.3 of 8 blocks: 2 whole ones
    assert tenth.keep.sum(-1).unique().tolist() == [2]
    apart = torch.eye(64)[token % 64].view(1, 128, 1, 64).expand(-1, -1, 2, -1)
    alone = AttentionCall(apart, apart, torch.randn(1, 128, 2, 64), grid)
    everything = Sparge(density=0.1, similarity=0.1, block_size=32, curve="raster")
    assert bool(everything.select(alone, order).keep.all())
    assert torch.equal(everything.attend(alone, BACKEND), BACKEND.dense(alone))


@pytest.mark.parametrize("text", [(0, 0), (3, 9)])
def test_sparge_compares_keys_without_their_mean_if_told(text: tuple[int, int]) -> None:
    """A mean key that all share hides how unlike they are; taking it off brings that back."""
    grid = TokenGrid(3, 5, 7, *text)
    free, order = random_call(grid), block_order(grid, 16)
    video = slice(text[0], text[0] + grid.tokens)
    key = free.key.clone()
    key[:, order.index[0, :40]] += 2  # five key blocks of like tokens, the others unlike
    key -= key[:, video].mean(1, keepdim=True)
    free = replace(free, query=free.query * 0.1 + 1, key=key)
    shared = replace(free, key=free.key + 20)
    params = {"density": 0.2, "similarity": 0.4, "block_size": 16}
    centred, plain = Sparge(centred=True, **params), Sparge(**params)
    expected = plain.select(free, order).keep
    assert torch.equal(centred.select(shared, order).keep, expected)
    assert torch.equal(centred.select(free, order).keep, expected)
    assert int(plain.select(shared, order).keep.sum()) < int(expected.sum()) < expected.numel()


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(4, 6, 6, 3, 9)], ids=str)
def test_sparge_is_sdpa_under_its_mask(grid: TokenGrid) -> None:
    call = random_call(grid)
    method = Sparge(density=0.3, block_size=16)
    allowed = method.select(call, block_order(grid, 16)).to_dense()
    assert float(allowed.float().mean()) < 0.8
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None])
    torch.testing.assert_close(
        method.attend(call, BACKEND), expected.transpose(1, 2), atol=3e-6, rtol=1e-5
    )


def skipped_by_definition(call: AttentionCall, mask: BlockMask, powers: float) -> torch.Tensor:
    """Attention of one head in slot order, tile after tile as the paper's Algorithm 1 goes."""
    order = mask.order
    q, k, v = (order.apply(x)[0, :, 0].double() for x in (call.query, call.key, call.value))
    real = order.index[0] >= 0
    out = torch.zeros_like(v)
    rows, columns = min(32, mask.q_block), mask.kv_block
    video = -(-call.grid.tokens // mask.q_block) * mask.q_block
    for first in range(0, len(q), rows):
        here = slice(first, first + rows)
        top, total = torch.full((rows,), -torch.inf).double(), torch.zeros(rows).double()
        for j in mask.keep[0, first // mask.q_block].nonzero().flatten().tolist():
            there = slice(j * columns, (j + 1) * columns)
            scores = q[here] @ k[there].t() * q.shape[1] ** -0.5
            scores = scores.masked_fill(~real[there], -torch.inf)
            local = scores.amax(1)
            far = (local - top)[real[here]] / math.log(2) <= -powers
            new = torch.maximum(top, local)
            shrink = (top - new).exp().nan_to_num(0)
            out[here] *= shrink[:, None]
            total *= shrink
            top = new
            if bool(far.all()) and first < video:
                continue
            weights = (scores - new[:, None]).exp().nan_to_num(0)
            out[here] += weights @ v[there]
            total += weights.sum(1)
        out[here] /= total.clamp(min=1e-300)[:, None]
    return out[order.inverse[0]]


@pytest.mark.parametrize("grid", [TokenGrid(4, 8, 9), TokenGrid(3, 7, 9, 4, 20)], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
def test_sparges_second_stage_is_the_running_maximum_rule(grid: TokenGrid, block_size: int) -> None:
    call = random_call(grid, heads=1)
    call = replace(call, query=call.query * 6)
    method = Sparge(density=0.6, skip=4.0, block_size=block_size)
    order = block_order(grid, block_size)
    first = method.select(call, order)
    second = skip_far_below(call, first, method.skip)
    assert second.q_block == min(32, block_size)
    finer = first.keep.repeat_interleave(first.q_block // second.q_block, dim=1)
    assert bool((finer | ~second.keep).all())
    assert 0.05 < second.density / first.density < 0.98
    expected = skipped_by_definition(call, first, method.skip)
    out = method.attend(call, BACKEND)
    torch.testing.assert_close(out[0, :, 0].double(), expected, atol=1e-5, rtol=1e-5)


def test_sparges_second_stage_is_lossless_at_the_authors_threshold_and_monotone() -> None:
    call = random_call(TokenGrid(4, 8, 9, 0, 7), batch=2)
    plain = Sparge(density=0.6, block_size=32)
    out = plain.attend(call, BACKEND)
    far = replace(call, query=call.query * 60)
    kept = []
    for powers in (50.0, 8.0, 2.0):
        method = replace(plain, skip=powers)
        one = AttentionCall(far.query[:1], far.key[:1], far.value[:1], far.grid)
        mask = method.select(one, block_order(far.grid, 32))
        kept.append(skip_far_below(one, mask, powers).keep)
    assert bool((kept[0] | ~kept[1]).all())
    assert bool((kept[1] | ~kept[2]).all())
    assert int(kept[2].sum()) < int(kept[1].sum()) < int(kept[0].sum())
    assert torch.equal(replace(plain, skip=50.0).attend(call, BACKEND), out)
    lossless = replace(plain, skip=50.0).attend(far, BACKEND)
    torch.testing.assert_close(lossless, plain.attend(far, BACKEND), atol=1e-6, rtol=0)
    assert plain.remarks() == []
    assert "plain torch" in replace(plain, skip=5.0).remarks()[0]


@pytest.mark.parametrize(("share", "within"), [(0.9, 2), (0.98, 3), (0.5, 1), (0.3, 0)])
def test_mass_rules_count_entries_within_a_share(share: float, within: int) -> None:
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    assert int(mass_counts(row, share)) == within


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_before_an_entry_are_those_after_the_one_before(dtype: torch.dtype) -> None:
    values = torch.full((3, 12), 1 / 12, dtype=dtype)
    before = sums_before(values)
    assert torch.equal(before[:, 1:], values.cumsum(1)[:, :-1])
    assert before[:, 0].tolist() == [0.0] * 3
    assert not torch.equal(before, values.cumsum(1) - values)  # which rounds


def test_the_oracle_beats_random_blocks_at_the_same_density() -> None:
    grid = TokenGrid(4, 8, 8)
    call = random_call(grid)
    call = AttentionCall(call.query * 3, call.key, call.value, grid)
    dense = BACKEND.dense(call)

    def error(method: object) -> float:
        return float((method.attend(call, BACKEND) - dense).square().mean())

    oracle = [error(OracleTopK(density=d, block_size=16)) for d in (0.2, 0.4, 0.8)]
    floor = [error(RandomBlocks(density=d, block_size=16)) for d in (0.2, 0.4, 0.8)]
    assert all(o < f for o, f in zip(oracle, floor, strict=True))
    assert oracle == sorted(oracle, reverse=True)
    assert torch.equal(OracleTopK(density=1.0).attend(call, BACKEND), dense)


def test_the_oracle_keeps_the_heaviest_blocks_of_each_row() -> None:
    grid = TokenGrid(4, 8, 8)
    call = random_call(grid, heads=1)
    weights = torch.softmax(call.query[0, :, 0] @ call.key[0, :, 0].t() * 0.25, -1)
    mass = weights.view(16, 16, 16, 16).sum((1, 3))
    kept = keep_top(mass, 4) | torch.eye(16, dtype=torch.bool)
    allowed = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    out = OracleTopK(density=0.25, block_size=16).attend(call, BACKEND)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_oracle_by_mass_keeps_the_fewest_blocks_that_hold_a_share(share: float) -> None:
    grid = TokenGrid(4, 8, 8)
    call = random_call(grid, heads=1)
    call = replace(call, query=call.query * 3)
    weights = torch.softmax(call.query[0, :, 0] @ call.key[0, :, 0].t() * 0.25, -1)
    mass = weights.view(16, 16, 16, 16).sum((1, 3)) / 16
    kept = torch.eye(16, dtype=torch.bool)  # rows keep their own block besides
    for row in range(16):
        held = 0.0
        for block in mass[row].argsort(descending=True).tolist():
            if held > share:
                break
            kept[row, block] = True
            held += float(mass[row, block])
    allowed = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    out = OracleTopK(mass=share, block_size=16).attend(call, BACKEND)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [SVG(density=1.0), Sparge(density=1.0)], ids=["svg", "sparge"])
def test_density_one_is_dense(method: object) -> None:
    call = random_call(TokenGrid(4, 8, 8, 3, 2), batch=2)
    torch.testing.assert_close(method.attend(call, BACKEND), BACKEND.dense(call), atol=1e-6, rtol=0)
