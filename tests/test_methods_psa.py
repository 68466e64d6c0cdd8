"""Pyramid sparse attention: the numeric oracle, level assignment tables, exactness cases."""

from itertools import product

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.cpu import CpuBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods.curves import block_order
from dittools.methods.psa import _CHUNK, PSA, assign_levels, block_importance, similarity_cap
from dittools.methods.pyramid import FACTORS, attend_levels, level_density, level_mask
from dittools.order import TokenOrder
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch

BACKEND = ReferenceBackend()


class Eager(CpuBackend):
    """The CPU backend, which never thinks dense attention faster."""

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        return False


def counts(levels: torch.Tensor) -> list[int]:
    return [int((levels == f).sum()) for f in (*FACTORS, 0)]


RANK, DECAY = 1 / torch.arange(1, 101.0), 0.9 ** torch.arange(100.0)


@pytest.mark.parametrize(
    ("importance", "ends", "expected", "density"),
    [
        (RANK, (0.4, 0.5, 0.6, 0.8), [7, 1, 5, 24, 63], 0.1175),
        (RANK, (0.5, 0.6, 0.7, 0.8), [8, 5, 8, 16, 63], 0.1450),
        (RANK, (0.7, 0.8, 0.9, 0.9), [21, 15, 24, 0, 40], 0.3450),
        (DECAY, (0.4, 0.5, 0.6, 0.8), [7, 0, 2, 8, 83], 0.0850),
        (torch.ones(100), (0.4, 0.5, 0.6, 0.8), [41, 10, 10, 20, 19], 0.5100),
        (torch.cat((torch.tensor([97.0]), torch.full((99,), 3 / 99))), (0.4, 0.5, 0.6, 0.8),
         [7, 0, 0, 0, 93], 0.0700),
    ],
)  # fmt: skip
def test_thresholds_assign_what_the_authors_code_assigns(
    importance: torch.Tensor, ends: tuple[float, ...], expected: list[int], density: float
) -> None:
    shuffled = torch.randperm(100)
    row = (importance / importance.sum())[shuffled].double()
    levels = assign_levels(row[None, None], "threshold", ends, 128)
    assert counts(levels) == expected
    assert level_density(levels) == pytest.approx(density)
    coarse = torch.where(levels > 0, levels, 16)[0, 0][row.argsort(descending=True, stable=True)]
    assert bool((coarse.diff() >= 0).all())  # more important is never coarser


def test_quotas_assign_shares_of_the_blocks() -> None:
    row = (RANK / RANK.sum())[None, None]
    default = assign_levels(row, "topk", (0.10, 0.15, 0.15, 0.35), 128)
    assert counts(default) == [10, 5, 0, 20, 65]
    assert level_density(default) == pytest.approx(0.15)
    distilled = assign_levels(row, "topk", (0.05, 0.15, 0.25, 0.50), 128)
    assert counts(distilled) == [5, 10, 10, 26, 49]
    assert level_density(distilled) == pytest.approx(0.1575)
    narrow = assign_levels(row, "topk", (0.10, 0.15, 0.15, 0.35), 32)
    assert counts(narrow) == [10, 6, 0, 24, 60]
    assert level_density(narrow) == pytest.approx(0.16)
    few = assign_levels(torch.full((1, 1, 4), 0.25), "topk", (0.10, 0.15, 0.15, 0.35), 128)
    assert counts(few)[0] == 1


def oracle_call() -> AttentionCall:
    i, k, j = torch.arange(2)[:, None], torch.arange(8)[:, None], torch.arange(4)
    query = torch.zeros(8, 4, dtype=torch.float64)
    query[:2] = torch.sin((i + 2 * j).double())
    key, value = torch.cos(0.5 * k - j), torch.sin((2 * k + j).double())
    return AttentionCall(
        *(x.double()[None, :, None] for x in (query, key, value)), TokenGrid(1, 1, 8)
    )


MIXED = [[0.088463, 0.151180, 0.074903, -0.070240], [0.110989, 0.198307, 0.103302, -0.086678]]
NO_BIAS = [[0.063051, 0.164901, 0.115141, -0.040479], [0.082581, 0.209130, 0.143405, -0.054165]]
MEAN = [[-0.031730, 0.170163, 0.215609, 0.062825]] * 2


@pytest.mark.parametrize(
    ("factors", "bias", "rows"),
    [((1, 2), True, MIXED), ((1, 2), False, NO_BIAS), ((4, 0), True, MEAN)],
)
def test_the_numeric_oracle(factors: tuple[int, int], bias: bool, rows: list[list[float]]) -> None:
    # blocks of 8 hold the oracle's blocks of 4 and as much padding each
    call, order = oracle_call(), padded_blocks(8, 4)
    levels = torch.tensor([factors]).expand(2, -1)[None]
    out = attend_levels(call, BACKEND, levels, order, 8, count_bias=bias)
    torch.testing.assert_close(out[0, :2, 0], torch.tensor(rows).double(), atol=1.5e-6, rtol=0)


def padded_blocks(tokens: int, size: int) -> TokenOrder:
    cut = torch.nn.functional.pad(torch.arange(tokens).view(-1, size), (0, size), value=-1)
    return TokenOrder(cut.reshape(1, -1), tokens)


def grouped_call(grid: TokenGrid, group: int, size: int = 16, batch: int = 1) -> AttentionCall:
    """Keys constant in aligned groups of the raster order; queries and values arbitrary."""
    q, k, v = (torch.randn(batch, grid.total, 2, 8) for _ in range(3))
    place = torch.arange(grid.tokens) // group
    k[:, grid.text_before : grid.text_before + grid.tokens] = torch.randn(
        batch, int(place.max()) + 1, 2, 8
    )[:, place]
    return AttentionCall(q, k, v, grid)


@pytest.mark.parametrize(
    "grid", [TokenGrid(4, 6, 8), TokenGrid(3, 5, 7, 4, 6), TokenGrid(1, 3, 3)], ids=str
)
@pytest.mark.parametrize("factor", FACTORS)
def test_one_level_is_exact_on_constant_groups(grid: TokenGrid, factor: int) -> None:
    call, order = grouped_call(grid, factor), block_order(grid, 16, "raster")
    blocks = -(-grid.tokens // 16)
    levels = torch.full((2, blocks, blocks), factor)
    out, dense = attend_levels(call, BACKEND, levels, order, 16), BACKEND.dense(call)
    torch.testing.assert_close(out, dense, atol=3e-6, rtol=1e-5)
    if factor > 1 and (grid.text or grid.tokens % factor):
        wrong = attend_levels(call, BACKEND, levels, order, 16, count_bias=False)
        assert float((wrong - dense).abs().max()) > 0.01


@pytest.mark.parametrize("factor", FACTORS[1:])
def test_one_level_everywhere_is_dense_attention_over_pooled_keys(factor: int) -> None:
    grid = TokenGrid(4, 4, 8)
    q, k, v = (torch.randn(1, 128, 2, 8) for _ in range(3))
    call, order = AttentionCall(q, k, v, grid), block_order(grid, 16, "raster")
    levels = torch.full((2, 8, 8), factor)
    out = attend_levels(call, BACKEND, levels, order, 16)
    pooled = (x.unflatten(1, (-1, factor)).mean(2).transpose(1, 2) for x in (k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *pooled)
    torch.testing.assert_close(out, wanted.transpose(1, 2), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("grid", [TokenGrid(3, 7, 9, 4, 6), TokenGrid(4, 8, 8), TokenGrid(1, 2, 3)])
def test_the_fast_kernel_agrees_at_every_block_size_and_level(grid: TokenGrid, size: int) -> None:
    q, k, v = (torch.randn(1, grid.total, 2, 16) for _ in range(3))
    call, order = AttentionCall(q, k, v, grid), block_order(grid, size)
    blocks = -(-grid.tokens // size)
    mixed = torch.tensor((0, *FACTORS))[torch.randint(5, (2, blocks, blocks))]
    mixed.diagonal(dim1=1, dim2=2).fill_(8)
    for levels in (mixed, *(torch.full_like(mixed, f) for f in FACTORS)):
        exact = attend_levels(call, BACKEND, levels, order, size)
        fast = attend_levels(call, Eager(), levels, order, size)
        torch.testing.assert_close(fast, exact, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [TokenGrid(4, 6, 8), TokenGrid(3, 5, 7, 4, 6)], ids=str)
def test_any_mixture_without_skips_is_exact_on_groups_of_eight(grid: TokenGrid) -> None:
    call, order = grouped_call(grid, 8), block_order(grid, 16, "raster")
    blocks = -(-grid.tokens // 16)
    levels = torch.tensor(FACTORS)[torch.randint(4, (2, blocks, blocks))]
    dense = BACKEND.dense(call)
    out = attend_levels(call, BACKEND, levels, order, 16)
    torch.testing.assert_close(out, dense, atol=3e-6, rtol=1e-5)
    wrong = attend_levels(call, BACKEND, levels, order, 16, count_bias=False)
    assert float((wrong - dense).abs().max()) > 0.05


def test_constant_values_stay_constant_with_skips_and_text_rows_are_dense() -> None:
    grid = TokenGrid(4, 8, 8, 5, 3)
    q, k, v = (torch.randn(2, grid.total, 2, 8) for _ in range(3))
    method = PSA(block_size=16, ends=(0.2, 0.3, 0.4, 0.5))
    constant = AttentionCall(q, k, torch.full_like(v, 0.3), grid)
    out = method.attend(constant, BACKEND)
    torch.testing.assert_close(out, torch.full_like(out, 0.3))
    call = AttentionCall(q, k, v, grid)
    out, dense = method.attend(call, BACKEND), BACKEND.dense(call)
    torch.testing.assert_close(out[:, :5], dense[:, :5], atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(out[:, -3:], dense[:, -3:], atol=3e-6, rtol=1e-5)
    assert not torch.allclose(out, dense, atol=1e-2)
    one = AttentionCall(q[1:], k[1:], v[1:], grid)
    torch.testing.assert_close(method.attend(one, BACKEND), out[1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("block_size", [(32, 32), (128, 32), (128, 128), (64, 16), (48, 48)])
def test_the_mask_costs_what_the_levels_say(block_size: tuple[int, int]) -> None:
    grid, (size, keys) = TokenGrid(4, 12, 16), block_size
    order = block_order(grid, size)
    levels = torch.tensor((0, *FACTORS))[torch.randint(5, (3, 768 // size, 768 // keys))]
    tokens = 768 * 15 // 8  # keys of all levels
    mask = level_mask(levels, grid, order, block_size, tokens)
    assert mask.density * tokens / 768 == pytest.approx(level_density(levels))
    if keys in (128, 48):  # pooled key blocks share no block of the launch
        assert mask.computed == pytest.approx(mask.density)
        assert mask.tiles is None


def by_definition(
    call: AttentionCall, levels: torch.Tensor, order: TokenOrder, size: int, keys: int
) -> tuple[torch.Tensor, int]:
    """Attention of every query over the blocks it asks for, pooled one by one; pairs computed."""
    grid, pairs = call.grid, 0
    slots = order.index[0]
    text = [t for t in range(grid.total) if not 0 <= t - grid.text_before < grid.tokens]
    out = torch.zeros_like(call.query)
    for head, i in product(range(call.head_count), range(order.slots // size)):
        rows = [t for t in slots[i * size : (i + 1) * size].tolist() if t >= 0]
        groups = [[t] for t in (text if i < levels.shape[1] else range(grid.total))]
        for j in range(levels.shape[2] if i < levels.shape[1] else 0):
            factor = int(levels[head, i, j])
            block = slots[j * keys : (j + 1) * keys]
            for place in range(0, keys if factor else 0, max(factor, 1)):
                group = [t for t in block[place : place + factor].tolist() if t >= 0]
                groups += [group] if group else []
        pairs += len(rows) * len(groups)
        k, v = (
            torch.stack([x[0, g, head].mean(0) for g in groups]) for x in (call.key, call.value)
        )
        count = torch.tensor([float(len(g)) for g in groups])
        scores = call.query[0, rows, head] @ k.t() * call.softmax_scale + count.log()
        out[0, rows, head] = scores.softmax(-1) @ v
    return out, pairs


@pytest.mark.parametrize("block_size", [(64, 32), (64, 16), (32, 32), (128, 64), (128, 32)])
@pytest.mark.parametrize("grid", [TokenGrid(3, 7, 9, 4, 6), TokenGrid(4, 8, 8)], ids=str)
def test_query_and_key_blocks_may_differ(grid: TokenGrid, block_size: tuple[int, int]) -> None:
    size, keys = block_size
    q, k, v = (torch.randn(1, grid.total, 2, 16) for _ in range(3))
    call, order = AttentionCall(q, k, v, grid), block_order(grid, size)
    shape = (2, -(-grid.tokens // size), -(-grid.tokens // keys))
    levels = torch.tensor((0, *FACTORS))[torch.randint(5, shape)]
    levels[:, :, 0] = 4
    expected, pairs = by_definition(call, levels, order, size, keys)
    for backend in (BACKEND, Eager()):
        meter = Meter(backend, call, lambda: BACKEND.dense(call), Stopwatch())
        out = attend_levels(call, meter, levels, order, size, key_block=keys)
        torch.testing.assert_close(out, expected, atol=3e-6, rtol=1e-5)
        assert float(meter.density(call)) == pytest.approx(pairs / (2 * grid.total**2))


@pytest.mark.parametrize("keys", [16, 32, 64])
@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_narrow_key_blocks_run_their_levels(keys: int, rule: str) -> None:
    grid = TokenGrid(5, 8, 9, 3, 5)
    q, k, v = (torch.randn(2, grid.total, 2, 16) * 2 for _ in range(3))
    call = AttentionCall(q, k, v, grid)
    method = PSA(
        block_size=128, key_block=keys, rule=rule, ends=(0.2, 0.3, 0.4, 0.6), similarity=(0.0,) * 3
    )
    out, order = method.attend(call, BACKEND), block_order(grid, 128)
    for item in range(2):
        one = AttentionCall(*(x[item : item + 1] for x in (q, k, v)), grid)
        levels = method.levels(one, order)
        assert levels.shape == (2, 3, -(-360 // keys))
        assert len(levels.unique()) > 2
        expected, _ = by_definition(one, levels, order, 128, keys)
        torch.testing.assert_close(out[item], expected[0], atol=3e-6, rtol=1e-5)


def test_everything_full_is_dense_and_importance_is_repeatable() -> None:
    grid = TokenGrid(4, 8, 8)
    q, k, v = (torch.randn(1, 256, 2, 8) for _ in range(3))
    call = AttentionCall(q, k, v, grid)
    method = PSA(ends=(1.0, 1.0, 1.0, 1.0), block_size=16)
    assert torch.equal(method.attend(call, BACKEND), BACKEND.dense(call))
    state = torch.get_rng_state()
    first = PSA(block_size=16).attend(call, BACKEND)
    assert torch.equal(first, PSA(block_size=16).attend(call, BACKEND))
    assert torch.equal(torch.get_rng_state(), state)


def test_importance_is_the_largest_sampled_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_CHUNK, True, 100)
    q, k = torch.randn(1, 48, 2, 8), torch.randn(1, 48, 2, 8)
    found = block_importance(q, k, 40, 16, 2, 0.5)
    scores = torch.einsum("qhd,khd->hqk", q[0, :40:2], k[0, :40:2]) * 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    for i in range(3):
        for j in range(3):
            part = weights[:, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8].amax((1, 2))
            expected = torch.stack([
                weights[:, i * 8 : i * 8 + 8, m * 8 : m * 8 + 8].amax((1, 2)) for m in range(3)
            ]).sum(0)  # fmt: skip
            torch.testing.assert_close(found[:, i, j], part / expected)


def test_importance_of_narrow_key_blocks_is_that_of_their_own_samples() -> None:
    q, k = torch.randn(1, 72, 2, 8), torch.randn(1, 72, 2, 8)
    found = block_importance(q, k, 72, 32, 2, 0.5, key_block=16)
    scores = torch.einsum("qhd,khd->hqk", q[0, ::2], k[0, ::2]) * 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    expected = torch.stack([
        torch.stack([part.amax((1, 2)) for part in rows.split(8, dim=2)], -1)
        for rows in weights.split(16, dim=1)
    ], 1)  # fmt: skip
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def by_the_authors_rule(
    value: list[float], rule: str, ends: tuple[float, ...], multiples: list[int]
) -> list[int]:
    """The level of every rank of one row, block by block; `value` falls."""
    blocks, levels, start, total = len(value), [0] * len(value), 0, sum(value)
    for factor, end, multiple in zip(FACTORS, ends, multiples, strict=True):
        within = sum(sum(value[: i + 1]) / total <= end + 1e-6 for i in range(blocks))
        stop = int(blocks * end) if rule == "topk" else (within + 1 if within else start)
        if factor == 1:
            stop = max(stop, 1 if rule == "topk" else int(blocks * 0.06) + 1)
        while (stop - start) % multiple:
            stop += 1
        while stop > blocks:
            stop -= multiple
        levels[start:stop] = [factor] * max(stop - start, 0)
        start = max(start, stop)
    return levels


@pytest.mark.parametrize("rule", ["threshold", "topk"])
@pytest.mark.parametrize("blocks", [1, 3, 8, 20, 61, 180])
def test_levels_are_the_authors_in_single_precision(blocks: int, rule: str) -> None:
    ends = [(0.4, 0.5, 0.6, 0.8), (0.1, 0.15, 0.15, 0.35), (0.5, 0.6, 0.7, 0.8), (0, 0, 0.3, 0.9)]
    rows = [torch.ones(blocks), torch.rand(blocks) ** 6 + 1e-6, 1 / torch.arange(1.0, blocks + 1)]
    for importance, end, (size, tile) in product(rows, ends, [(128, 32), (32, 32), (16, 16)]):
        row = (importance / importance.sum()).float()
        multiples = [-(-factor // (size // tile)) for factor in FACTORS]
        found = assign_levels(row[None], rule, end, size, tile)[0]
        value, order = row.sort(descending=True, stable=True)
        expected = by_the_authors_rule(value.double().tolist(), rule, end, multiples)
        assert found[order].tolist() == expected, (end, size)


def test_a_level_that_ends_at_one_leaves_no_block_out() -> None:
    for rule, blocks in product(("threshold", "topk"), (5, 13, 61)):
        row = torch.rand(blocks)
        for size in (16, 32, 128):
            assert bool((assign_levels(row[None], rule, (0.2, 0.4, 0.6, 1.0), size, 16) > 0).all())


def test_padding_says_nothing_about_the_likeness_of_a_ragged_block() -> None:
    """16 keys of which 11 are real, all alike: as good to pool as a whole block of them."""
    key = torch.zeros(1, 32, 1, 8)
    key[0, :16], key[0, 16:27] = torch.randn(16, 1, 8), torch.randn(1, 8)
    assert similarity_cap(key, 27, 16, (0.9, 0.9, 0.9))[0, 1] == 8
    key[0, 24:27] = -key[0, 24:27]  # the last group's own tokens alike, the one before's too
    assert similarity_cap(key, 27, 16, (0.9, 0.9, 0.9))[0, 1] == 8
    key[0, 26] = -key[0, 26]  # the 8s: 1 and -1; the 4s: 1, 1, -1; the 2s: 1, 1, 1, 1, 1, 1
    assert similarity_cap(key, 27, 16, (0.9, 0.9, 0.9))[0, 1] == 2
    assert similarity_cap(key, 27, 16, (0.9, 0.3, 0.3))[0, 1] == 4


def test_the_similarity_cap_only_refines() -> None:
    key = torch.randn(1, 32, 1, 8)
    key[0, :16] = torch.randn(1, 1, 8)  # block 0: all alike; block 1: unlike
    assert similarity_cap(key, 32, 16, (0.7, 0.65, 0.6)).tolist() == [[8, 1]]
    grid = TokenGrid(4, 8, 8)
    q, k, v = (torch.randn(1, 256, 2, 8) for _ in range(3))
    call, order = AttentionCall(q, k, v, grid), block_order(grid, 16)
    free, capped = PSA(block_size=16), PSA(block_size=16, similarity=(0.9, 0.9, 0.9))
    a, b = free.levels(call, order), capped.levels(call, order)
    assert bool((b <= a).all())
    assert torch.equal(a == 0, b == 0)
    assert bool((b < a).any())


@pytest.mark.parametrize(
    "params",
    [
        {"ends": (0.5, 0.4, 0.6, 0.7)},
        {"ends": (0.5,)},
        {"similarity": (0.5,)},
        {"block_size": 20},
        {"key_block": 8},
        {"key_block": 48},
        {"key_block": 256},
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict) -> None:
    with pytest.raises(InputError, match=f"psa: {next(iter(params))} is not usable; expected"):
        PSA(**params)
