"""Rectified sparse attention: the numeric oracle, its exactness cases, the Hilbert neighbours."""

from dataclasses import replace

import pytest
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.auto import AutoBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.methods import build, preset
from dittools.methods.curves import block_order, gilbert, neighbour_blocks
from dittools.methods.rectified import (
    Rectified,
    _mask,
    _rank,
    first_frame_blocks,
    rectified_blocks,
)
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch

BACKEND = ReferenceBackend()
PLAIN = {"neighbours": False, "curve": "raster"}


def oracle_call() -> AttentionCall:
    i, j = torch.arange(10, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)
    parts = (2 * torch.sin(0.3 * i + j), 2 * torch.cos(0.2 * i - j), torch.sin(i + 2 * j))
    return AttentionCall(*(x[None, :, None] for x in parts), TokenGrid(1, 1, 8, 0, 2))


def test_the_numeric_oracle() -> None:
    call, method = oracle_call(), Rectified(density=0.25, mass=0.3, block_size=2, **PLAIN)
    found = rectified_blocks(call, method, block_order(call.grid, 2, "raster"))
    rows = [
        [0.037905, 0.110645, 0.236871, 0.329794, 0.284786],
        [0.212090, 0.330315, 0.281003, 0.133953, 0.042639],
        [0.492653, 0.350677, 0.125436, 0.026520, 0.004715],
        [0.684821, 0.250883, 0.054037, 0.008720, 0.001540],
    ]
    got = torch.cat((found.probability[0], found.text[0][:, None]), 1)
    torch.testing.assert_close(got, torch.tensor(rows).double(), atol=1e-6, rtol=0)
    assert found.kept[0].int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    comp = [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]
    assert found.compensated[0].int().tolist() == comp
    factor = torch.tensor([0.614579, 0.372954, 0.497368, 0.695080]).double()
    torch.testing.assert_close(found.factor[0], factor, atol=1e-6, rtol=0)
    out = method.attend(call, BACKEND)[0, :, 0]
    first = torch.tensor([0.169984, -0.088027, -0.096720, 0.168527]).double()
    seventh = torch.tensor([0.318113, 0.213406, -0.495730, 0.199186]).double()
    torch.testing.assert_close(out[0], first, atol=1e-6, rtol=0)
    torch.testing.assert_close(out[7], seventh, atol=1e-6, rtol=0)
    assert float(out.sum()) == pytest.approx(1.822230, abs=1e-5)


def by_the_formula(call: AttentionCall, method: Rectified) -> torch.Tensor:
    """The paper's steps for one head, block by block in float64; [S, D]."""
    grid, size = call.grid, method.block_size
    q, k, v = (x[0, :, 0] for x in (call.query, call.key, call.value))
    keep = torch.ones(grid.total, dtype=torch.bool)
    if call.key_mask is not None:
        keep = call.key_mask[0]
    is_text = torch.ones(grid.total, dtype=torch.bool)
    is_text[grid.text_before : grid.text_before + grid.tokens] = False
    text = (is_text & keep).nonzero().flatten()
    video = gilbert(*grid.shape, along_width=True) + grid.text_before
    blocks, scale = video.split(size), q.shape[1] ** -0.5
    count, own = len(blocks), torch.tensor([float(len(b)) for b in blocks]).double()
    mean = [torch.stack([x[b].mean(0) for b in blocks]) for x in (q, k, v)]
    spread = [torch.stack([(x[b] - x[b].mean(0)).abs().mean(0) for b in blocks]) for x in (q, k)]
    raw = mean[0] @ mean[1].t()
    weight = (torch.cat((raw, mean[0] @ k[text].t()), 1) * scale).softmax(1)
    mass = torch.cat((weight[:, :count] * own, weight[:, count:].sum(1, keepdim=True)), 1)
    chance = mass / mass.sum(1, keepdim=True)
    ranked = chance if method.text_ranks else chance[:, :count] / chance[:, :count].sum(1)[:, None]
    place = grid.coordinates()
    error = (spread[0] @ mean[1].t()).abs() + (mean[0] @ spread[1].t()).abs()
    out = torch.empty_like(q)
    for i, rows in enumerate(blocks):
        best = ranked[i].sort(descending=True)
        most = max(
            int(method.density * count + 1e-9),
            1 + int((best.values.cumsum(0) <= method.mass).sum()),
        )
        kept = {j for j in best.indices[:most].tolist() if j < count}
        if method.neighbours:
            apart = [(place[rows][:, None] - place[b]).abs().amax(2).min() for b in blocks]
            kept |= {j for j, steps in enumerate(apart) if steps <= 1}
        if method.first_frame and i < count // grid.frames:
            kept |= set(range(count // grid.frames))
        added = [j for j in range(count) if j not in kept and raw[i, j].abs() > error[i, j]]
        seen = torch.cat([blocks[j] for j in sorted(kept)] + [text])
        plain = (q[rows] @ k[seen].t() * scale).softmax(1) @ v[seen]
        out[rows] = (1 - chance[i, added].sum()) * plain + chance[i, added] @ mean[2][added]
    out[is_text] = (q[is_text] @ k[keep].t() * scale).softmax(1) @ v[keep]
    return out


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(3, 5, 7),
        TokenGrid(9, 3, 2, 5, 0),
        TokenGrid(1, 9, 4, 0, 7),
        TokenGrid(13, 1, 3, 2, 3),
    ],
    ids=str,
)
def test_every_option_is_the_formula_on_ragged_grids(grid: TokenGrid, size: int) -> None:
    kept = torch.rand(1, grid.total) < 0.7
    kept[:, grid.text_before : grid.text_before + grid.tokens] = True
    for density, mass, flags in ((0.0, 0.0, 1), (0.3, 0.3, 2), (0.1, 0.9, 4), (0.6, 0.5, 7)):
        method = Rectified(
            density=density,
            mass=mass,
            block_size=size,
            neighbours=bool(flags & 1),
            first_frame=bool(flags & 2),
            text_ranks=not flags & 4,
        )
        q, k, v = torch.randn(3, 1, grid.total, 1, 8, dtype=torch.float64).unbind()
        call = AttentionCall(q, k, v, grid, key_mask=kept if grid.text else None)
        out = method.attend(call, BACKEND)[0, :, 0]
        torch.testing.assert_close(out, by_the_formula(call, method), atol=1e-10, rtol=0)


def block_constant_call(grid: TokenGrid, size: int, curve: str) -> AttentionCall:
    """Query and key constant inside every block of the curve; values and text arbitrary."""
    order = block_order(grid, size, curve)
    q, k, v = (torch.randn(1, grid.total, 2, 8, dtype=torch.float64) for _ in range(3))
    video = slice(grid.text_before, grid.text_before + grid.tokens)
    block = order.inverse[0, video] // size
    for x in (q, k):
        x[:, video] = torch.randn(1, int(block.max()) + 1, 2, 8, dtype=torch.float64)[:, block]
    return AttentionCall(q, k, v, grid)


@pytest.mark.parametrize("density", [0.12, 0.24, 0.88])
@pytest.mark.parametrize("grid", [TokenGrid(4, 8, 8), TokenGrid(3, 7, 9, 5, 6)], ids=str)
@pytest.mark.parametrize("curve", ["gilbert", "raster"])
def test_is_exact_when_blocks_are_constant(grid: TokenGrid, density: float, curve: str) -> None:
    call = block_constant_call(grid, 16, curve)
    params = {
        "density": density,
        "mass": 0.0,
        "block_size": 16,
        "curve": curve,
        "neighbours": False,
    }
    method = Rectified(**params)
    assert not bool(rectified_blocks(call, method, block_order(grid, 16, curve)).kept.all())
    torch.testing.assert_close(
        method.attend(call, BACKEND), BACKEND.dense(call), atol=1e-12, rtol=0
    )
    plain = Rectified(compensate=False, **params).attend(call, BACKEND)
    assert not torch.allclose(plain, BACKEND.dense(call), atol=1e-2)


def test_without_the_size_of_blocks_text_would_spoil_the_exactness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = {"density": 0.24, "mass": 0.0, "block_size": 16, **PLAIN}
    for text, close in ((0, True), (6, False)):
        call = block_constant_call(TokenGrid(4, 8, 8, 0, text), 16, "raster")
        with monkeypatch.context() as patch:
            ones = lambda tokens, size, like: torch.ones(-(-tokens // size))  # noqa: E731
            patch.setattr("dittools.methods.rectified.block_sizes", ones)
            patch.setattr("dittools.methods.rectified._deviation", lambda x, mean, *_: mean * 0)
            out = Rectified(**params).attend(call, BACKEND)
        assert torch.allclose(out, BACKEND.dense(call), atol=1e-9) == close


def test_reordering_alone_changes_nothing() -> None:
    grid = TokenGrid(3, 7, 9, 5, 6)
    call, method, order = random_call(grid), Rectified(block_size=16), block_order(grid, 16)
    blocks = -(-grid.tokens // 16)
    everything = _mask(grid, method, torch.ones((1, blocks, blocks), dtype=torch.bool), order)
    out = BACKEND.block_sparse(call, everything)
    torch.testing.assert_close(out, BACKEND.dense(call), atol=3e-6, rtol=1e-5)


def random_call(grid: TokenGrid, batch: int = 1) -> AttentionCall:
    return AttentionCall(*(torch.randn(batch, grid.total, 2, 8) for _ in range(3)), grid)


def test_coefficients_sum_to_one_and_constants_stay_constant() -> None:
    grid = TokenGrid(4, 8, 9, 3, 4)
    call = random_call(grid)
    method = Rectified(block_size=16)
    found = rectified_blocks(call, method, block_order(grid, 16))
    total = found.factor + (found.probability * found.compensated).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert float(found.factor.min()) >= 0
    assert bool(found.compensated.any())
    constant = AttentionCall(call.query, call.key, torch.full_like(call.value, 1.5), grid)
    out = method.attend(constant, BACKEND)
    torch.testing.assert_close(out, torch.full_like(out, 1.5))


def test_everything_kept_is_dense_and_no_compensation_is_plain_block_sparse() -> None:
    grid = TokenGrid(3, 6, 8, 2, 5)
    call = random_call(grid, batch=2)
    assert torch.equal(
        Rectified(density=1.0, block_size=16).attend(call, BACKEND)[0], BACKEND.dense(call)[0]
    )
    method = Rectified(block_size=16, compensate=False, density=0.3)
    out = method.attend(call, BACKEND)
    for item in range(2):
        one = AttentionCall(*(x[item : item + 1] for x in (call.query, call.key, call.value)), grid)
        found = rectified_blocks(one, method, block_order(grid, 16))
        assert bool((found.factor == 1).all())
        torch.testing.assert_close(
            out[item : item + 1], method.attend(one, BACKEND), atol=1e-6, rtol=0
        )
    dense = BACKEND.dense(call)
    text = torch.tensor([0, 1, -1, -2, -3, -4, -5])
    torch.testing.assert_close(out[:, text], dense[:, text], atol=2e-6, rtol=1e-5)


def test_blocks_of_one_token_are_exact_when_all_are_compensated() -> None:
    call = oracle_call()
    method = Rectified(density=0.3, mass=0.0, block_size=1, **PLAIN)
    found = rectified_blocks(call, method, block_order(call.grid, 1, "raster"))
    assert torch.equal(found.compensated, ~found.kept)
    torch.testing.assert_close(
        method.attend(call, BACKEND), BACKEND.dense(call), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("text", [(0, 0), (3, 4)])
def test_a_single_block_is_dense(text: tuple[int, int]) -> None:
    call = random_call(TokenGrid(1, 3, 4, *text))
    for density in (0.1, 1.0):
        method = Rectified(block_size=16, density=density, mass=0.0)
        found = rectified_blocks(call, method, block_order(call.grid, 16))
        assert found.kept.shape == (2, 1, 1)
        if bool(found.kept.all()):  # text may take the only place of a row
            dense = BACKEND.dense(call)
            torch.testing.assert_close(method.attend(call, BACKEND), dense, atol=2e-6, rtol=1e-5)
        else:
            assert sum(text)
        constant = replace(call, value=torch.full_like(call.value, 0.6))
        out = method.attend(constant, BACKEND)
        torch.testing.assert_close(out, constant.value)


def test_selection_counts_follow_the_authors_rule() -> None:
    row = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]], dtype=torch.float64)
    text = torch.zeros(1, 1, dtype=torch.float64)

    def count(density: float, mass: float) -> int:
        return int(_rank(row, text, Rectified(density=density, mass=mass)).sum())

    assert [count(0.0, p) for p in (0.3, 0.5, 0.9)] == [1, 2, 3]
    assert [count(d, 0.3) for d in (0.5, 0.75, 1.0)] == [2, 3, 4]
    heavy_text = torch.tensor([[0.9]], dtype=torch.float64)
    assert int(_rank(row * 0.1, heavy_text, Rectified(density=0.25, mass=0.0)).sum()) == 0
    only_blocks = Rectified(density=0.25, mass=0.0, text_ranks=False)
    assert int(_rank(row * 0.1, heavy_text, only_blocks).sum()) == 1


@pytest.mark.parametrize(
    "shape", [(4, 16, 16), (3, 5, 7), (1, 9, 4), (1, 1, 6), (5, 1, 1), (6, 10, 3)]
)
def test_the_curve_visits_every_token_once(shape: tuple[int, int, int]) -> None:
    order = gilbert(*shape)
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    place = TokenGrid(*shape).coordinates()[order]
    steps = (place[1:] - place[:-1]).abs()
    assert len(steps) == 0 or float((steps.sum(1) > 1).float().mean()) < 0.05
    assert len(steps) == 0 or int(steps.max()) <= 1  # at most a diagonal step on odd sizes


@pytest.mark.parametrize(
    ("shape", "blocks", "mean", "least", "most"),
    [((4, 16, 16), 8, 4.75, 3, 7), ((8, 24, 40), 60, 10.567, 6, 17)],
)
def test_neighbours_are_those_of_the_authors_curve(
    shape: tuple[int, int, int], blocks: int, mean: float, least: int, most: int
) -> None:
    near = neighbour_blocks(TokenGrid(*shape), 128)
    counts = near.sum(1)
    assert len(near) == blocks
    assert torch.equal(near, near.t())
    assert float(counts.float().mean()) == pytest.approx(mean, abs=5e-4)
    assert (int(counts.min()), int(counts.max())) == (least, most)


@pytest.mark.parametrize("shape", [(3, 5, 2), (5, 2, 3), (2, 3, 3), (7, 1, 4), (1, 6, 4)])
def test_the_curve_starts_along_the_width_whatever_the_longest_side(
    shape: tuple[int, int, int],
) -> None:
    """As the authors call it; the curve of other methods starts along the longest side."""
    fixed, longest = gilbert(*shape, along_width=True), gilbert(*shape)
    assert torch.equal(fixed.sort().values, torch.arange(len(fixed)))
    wide = shape[2] >= max(shape)
    assert torch.equal(fixed, longest) is wide
    grid = TokenGrid(*shape)
    call, method = random_call(grid), Rectified(density=0.3, block_size=2)
    order = block_order(grid, 2, "gilbert_along_width")
    found = rectified_blocks(call, method, order)
    near = neighbour_blocks(grid, 2, "gilbert_along_width")
    assert bool(found.kept[:, near].all())
    block = order.inverse[0] // 2
    allowed = found.kept[:, block][:, :, block]
    q, k, v = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    means = torch.stack([v[:, block == b].mean(1) for b in range(len(near))], 1)
    added = (found.probability * found.compensated) @ means
    expected = found.factor[:, block, None] * plain + added[:, block]
    torch.testing.assert_close(method.attend(call, BACKEND)[0], expected.transpose(0, 1))


AUTHORS = {  # gilbert_mapping of the authors' repository, frames x height x width
    (3, 1, 2): [0, 2, 4, 5, 3, 1],
    (2, 3, 1): [2, 5, 1, 4, 3, 0],
    (3, 4, 2): [
        0,
        8,
        10,
        2,
        4,
        12,
        6,
        14,
        22,
        20,
        18,
        16,
        17,
        19,
        21,
        13,
        23,
        15,
        7,
        5,
        3,
        11,
        9,
        1,
    ],
}


@pytest.mark.parametrize("shape", AUTHORS)
def test_the_curve_is_the_authors_on_grids_higher_or_longer_than_wide(
    shape: tuple[int, int, int],
) -> None:
    assert gilbert(*shape, along_width=True).tolist() == AUTHORS[shape]


def test_the_first_frame_of_wan_is_kept_in_the_authors_number_of_blocks() -> None:
    assert first_frame_blocks(TokenGrid(21, 45, 80), 128) == 28
    assert first_frame_blocks(TokenGrid(7, 2, 2), 128) == 0  # a frame is less than a block
    grid = TokenGrid(4, 8, 9)
    call, order = random_call(grid), block_order(grid, 16)
    free, held = (
        rectified_blocks(
            call, Rectified(block_size=16, neighbours=False, first_frame=f), order
        ).kept
        for f in (False, True)
    )
    assert not bool(free[:, :4, :4].all())
    assert bool(held[:, :4, :4].all())
    outside = torch.ones_like(free)
    outside[:, :4, :4] = False
    assert torch.equal(free & outside, held & outside)
    for family in ("wan", "wan22"):
        assert preset("rectified", family).method.first_frame is True
    assert preset("rectified", "hunyuan_video").method.first_frame is False


@pytest.mark.parametrize("auto", [False, True], ids=["reference", "auto"])
@pytest.mark.parametrize("name", ["rectified", "psa", "svg2", "clear"])
def test_where_dense_is_faster_the_result_is_dense_and_not_a_mixture(
    name: str, auto: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {
        "rectified": {"block_size": 16, "neighbours": False},
        "psa": {"block_size": 16},
        "svg2": {"mass": 0.4, "least_queries": 12, "least_keys": 12, "block_size": 16},
        "clear": {"radius": 2, "down_factor": 2, "block_size": 16},
    }
    grid = TokenGrid(1, 8, 8)
    call, method = random_call(grid), build(name, params[name])
    backend = AutoBackend() if auto else BACKEND
    meter = Meter(backend, call, lambda: backend.dense(call), Stopwatch())
    if auto:
        monkeypatch.setattr("dittools.kernels.cpu.CpuBackend.prefers_dense", lambda *_: True)
    out = method.attend(call, meter)
    exact = method.attend(replace(call, memory={}), BACKEND)
    expected = BACKEND.dense(call) if auto and name != "clear" else exact
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=1e-5)
    assert not torch.allclose(exact, BACKEND.dense(call), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    grid = TokenGrid(4, 8, 8, 0, 5)
    q, k, v = (torch.randn(1, grid.total, 2, 8) * 40 for _ in range(3))
    call = AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), grid)
    out = Rectified(block_size=16).attend(call, BACKEND)
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
