"""Neighborhood attention against its formula token by token, and the published simulator tables."""

import json
from itertools import product

import pytest
import torch

from dittools.call import AttentionCall
from dittools.cli import main
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.gna import GNA, axis_pattern, gna_tile
from dittools.methods.gna_simulator import gna_simulate, perfect_strides
from dittools.methods.sta import STA


def keys_of(i: int, length: int, w: int, s: int = 1, d: int = 1, causal: bool = False) -> list[int]:
    """One query of one axis, by the definition."""
    group = list(range(i % d, length, d))
    n, inner = len(group), i // d
    w = min(w, n)
    s = min(s, w)
    if causal:
        leader = min(s * (inner // s) + s - 1, n - 1)
        return group[max(leader - w + 1, 0) : inner + 1]
    leader = min(s * (inner // s) + s // 2, n - 1)
    start = min(max(leader - w // 2, 0), n - w)
    return group[start : start + w]


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (10, 4, 1, [0, 0, 0, 1, 2, 3, 4, 5, 6, 6]),
        (10, 4, 2, [0, 0, 1, 1, 3, 3, 5, 5, 6, 6]),
        (10, 4, 4, [0, 0, 0, 0, 4, 4, 4, 4, 6, 6]),
        (10, 5, 3, [0, 0, 0, 2, 2, 2, 5, 5, 5, 5]),
    ],
)
def test_windows_start_where_natten_starts_them(
    length: int, window: int, stride: int, starts: list[int]
) -> None:
    seen = axis_pattern(length, window, stride)
    assert seen.int().argmax(1).tolist() == starts
    assert seen.sum(1).tolist() == [window] * length


def test_causal_and_dilated_axes_follow_the_worked_examples() -> None:
    rows = axis_pattern(10, 4, 3, causal=True)
    ends = [(0, 0), (0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7), (5, 8), (6, 9)]
    assert [(int(r.nonzero()[0]), int(r.nonzero()[-1])) for r in rows] == ends
    dilated = axis_pattern(11, 3, dilation=3)
    found = {q: dilated[q].nonzero().flatten().tolist() for q in (0, 9, 2, 8)}
    assert found == {0: [0, 3, 6], 9: [3, 6, 9], 2: [2, 5, 8], 8: [2, 5, 8]}


def test_every_axis_equals_its_definition() -> None:
    for length, w, s, d, causal in product(
        (1, 2, 7, 12), (1, 2, 3, 9), (1, 2, 3, 5), (1, 2, 3), (False, True)
    ):
        if d > length:
            continue
        seen = axis_pattern(length, w, s, d, causal)
        for i in range(length):
            assert seen[i].nonzero().flatten().tolist() == keys_of(i, length, w, s, d, causal)


@pytest.mark.parametrize("tile", [None, (2, 4, 4), (1, 3, 5), (4, 1, 2)])
@pytest.mark.parametrize(
    "params",
    [
        {"window": (2, 4, 3)},
        {"window": (3, 4, 5), "stride": (1, 2, 4)},
        {"window": 3, "stride": 1, "dilation": (1, 2, 1)},
        {"window": ("full", 3, 0.5), "stride": 1, "causal": (True, False, False)},
    ],
)
@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5)])
def test_the_mask_is_the_box_product_whatever_the_tile(
    params: dict, tile: tuple[int, int, int] | None, text: tuple[int, int]
) -> None:
    params = {"stride": 1, **params, "tile": tile, "block_size": 16}
    grid = TokenGrid(4, 6, 7, *text)
    gna = GNA(**params)
    window = (4, 3, 4) if "full" in str(params["window"]) else params["window"]

    def side(value: object, axis: int) -> object:
        return value[axis] if isinstance(value, tuple) else value

    axes = []
    for axis, length in enumerate(grid.shape):
        args = (
            side(window, axis),
            side(gna.stride, axis),
            side(gna.dilation, axis),
            side(gna.causal, axis),
        )
        seen = torch.zeros((length, length), dtype=torch.bool)
        for i in range(length):
            seen[i, keys_of(i, length, *args)] = True
        axes.append(seen)
    box = torch.einsum("ab,cd,ef->acebdf", *(a.int() for a in axes)).reshape(168, 168).bool()
    expected = torch.ones((grid.total, grid.total), dtype=torch.bool)
    inside = slice(text[0], text[0] + 168)
    expected[inside, inside] = box
    mask = gna.mask(grid)
    assert torch.equal(mask.to_dense()[0], expected)
    assert mask.density == pytest.approx(float(expected.float().mean()))


def test_density_is_the_product_of_window_shares_and_stride_is_idle_on_full_axes() -> None:
    grid = TokenGrid(6, 10, 12)
    for stride in (1, 2, 3):
        mask = GNA(window=(3, 5, 4), stride=stride).mask(grid)
        assert mask.density == pytest.approx(3 * 5 * 4 / (6 * 10 * 12))
    full = [GNA(window="full", stride=s).mask(grid).density for s in (1, 4, "tile")]
    assert full == [1.0, 1.0, 1.0]


def test_shares_survive_a_change_of_resolution() -> None:
    gna = GNA(window=("full", 0.5, 0.25), stride=1)
    for height, width in ((8, 16), (12, 24), (16, 8)):
        assert gna.mask(TokenGrid(3, height, width)).density == pytest.approx(0.125)


def test_windows_longer_than_an_axis_are_clipped() -> None:
    grid = TokenGrid(2, 3, 5)
    assert GNA(window=99, stride=7, dilation=9).mask(grid).density == pytest.approx(1 / 30)
    assert GNA(window=99, stride=7).mask(grid).density == 1.0


def test_the_output_does_not_depend_on_the_tile() -> None:
    grid = TokenGrid(4, 6, 7, 0, 3)
    q, k, v = (torch.randn(2, grid.total, 2, 8) for _ in range(3))
    call, backend = AttentionCall(q, k, v, grid), ReferenceBackend()
    first = GNA(window=(3, 3, 4), stride=1, tile=(2, 2, 4)).attend(call, backend)
    second = GNA(window=(3, 3, 4), stride=1, tile=(1, 6, 7)).attend(call, backend)
    torch.testing.assert_close(first, second, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(first, backend.dense(call), atol=1e-2)
    torch.testing.assert_close(first[:, -3:], backend.dense(call)[:, -3:], atol=2e-6, rtol=1e-5)


def test_perfect_configurations_have_no_cut_tile() -> None:
    grid = TokenGrid(4, 16, 16)
    mask = GNA(window=(4, 12, 12), stride=(4, 4, 4), tile=(4, 4, 4)).mask(grid)
    assert mask.tiles is None
    assert mask.computed == mask.density == (12 / 16) ** 2


def test_the_tile_visits_the_fewest_blocks_of_its_size() -> None:
    for grid in (TokenGrid(9, 12, 20), TokenGrid(5, 16, 16, 0, 20)):
        gna = GNA(window=("full", 5, 8), stride=(1, 2, 4), block_size=32)
        chosen = gna_tile(grid, gna)
        cost = {}
        for f, h in product((1, 2, 4, 8, 16, 32), repeat=2):
            if 32 % (f * h) == 0:
                tile = (f, h, 32 // (f * h))
                mask = GNA(gna.window, gna.stride, tile=tile).mask(grid)
                cost[tile] = int(mask.keep.sum())
        assert cost[chosen] == min(cost.values()) < max(cost.values())


# window, stride, visited, sim, (attention share, end to end), (dense share, end to end)
HUNYUAN = [
    ((1, 1, 1), 275, 3.27, 1.73, 1.42),
    ((2, 1, 1), 250, 3.60, 1.78, 1.44),
    ((1, 1, 8), 165, 5.45, 1.98, 1.53),
    ((2, 1, 8), 150, 6.00, 2.02, 1.55),
    ((1, 8, 8), 99, 9.09, 2.18, 1.61),
    ((2, 8, 8), 90, 10.00, 2.20, 1.62),
    ((16, 8, 8), 81, 11.11, 2.23, 1.63),
    ((18, 24, 24), 135, 6.67, 2.07, 1.57),
]


@pytest.mark.parametrize(("stride", "visited", "sim", "end", "end_warm"), HUNYUAN)
def test_simulator_gives_the_published_hunyuan_table(
    stride: tuple[int, int, int], visited: int, sim: float, end: float, end_warm: float
) -> None:
    run = gna_simulate(TokenGrid(30, 48, 80), (18, 24, 24), stride, (4, 8, 8), (2, 8, 8))
    assert (run.visited, run.total) == (visited, 900)
    assert run.speedup == pytest.approx(sim, abs=0.005)
    assert run.end_to_end(0.607) == pytest.approx(end, abs=0.006)
    assert run.end_to_end(0.607, 15 / 50) == pytest.approx(end_warm, abs=0.006)
    assert run.perfect == (stride == (16, 8, 8))
    assert run.visited_mean <= run.visited


COSMOS, FLUX = TokenGrid(16, 44, 80), TokenGrid(1, 256, 256)
COSMOS_STRIDES = [(1, 1, 1), (1, 8, 1), (1, 1, 16), (1, 8, 16)]


@pytest.mark.parametrize(
    ("stride", "sim"),
    [((1, 1, 1), 1.43), ((1, 1, 8), 2.00), ((1, 32, 8), 2.40), ((30, 40, 40), 2.00)],
)
def test_simulator_gives_the_published_wide_hunyuan_window(
    stride: tuple[int, int, int], sim: float
) -> None:
    run = gna_simulate(TokenGrid(30, 48, 80), (30, 40, 40), stride, (2, 16, 8), (2, 8, 8))
    assert run.speedup == pytest.approx(sim, abs=0.005)


@pytest.mark.parametrize(
    ("stride", "sim", "end", "end_warm"),
    [
        ((1, 1, 1), 6.10, 1.76, 1.42),
        ((1, 16, 1), 8.53, 1.84, 1.45),
        ((1, 16, 16), 10.24, 1.88, 1.46),
    ],
)
def test_simulator_gives_the_published_flux_table(
    stride: tuple[int, int, int], sim: float, end: float, end_warm: float
) -> None:
    run = gna_simulate(FLUX, (1, 80, 80), stride, (1, 16, 16), (1, 16, 8))
    assert run.speedup == pytest.approx(sim, abs=0.005)
    assert run.end_to_end(0.518) == pytest.approx(end, abs=0.006)
    assert run.end_to_end(0.518, 9 / 28) == pytest.approx(end_warm, abs=0.006)


@pytest.mark.parametrize(
    ("window", "ends", "paper"),
    [
        ((16, 24, 16), [1.90, 1.96, 2.05, 2.10], [1.90, 1.96, 2.05, 2.10]),
        ((16, 32, 48), [1.33, 1.40, 1.43, 1.49], [1.35, 1.42, 1.42, 1.50]),  # rebuilt to 0.02
    ],
)
def test_simulator_gives_the_published_cosmos_table(
    window: tuple[int, int, int], ends: list[float], paper: list[float]
) -> None:
    runs = [gna_simulate(COSMOS, window, s, (8, 4, 8), (4, 4, 8)) for s in COSMOS_STRIDES]
    found = [run.end_to_end(0.587) for run in runs]
    assert found == pytest.approx(ends, abs=0.006)
    assert found == pytest.approx(paper, abs=0.021)


def test_text_tiles_cost_extra() -> None:
    hunyuan = TokenGrid(30, 48, 80, 0, 256)
    run = gna_simulate(hunyuan, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8))
    assert run.speedup == pytest.approx(10.87, abs=0.005)
    flux = TokenGrid(1, 256, 256, 512)
    run = gna_simulate(flux, (1, 80, 80), (1, 16, 16), (1, 16, 16), (1, 16, 8))
    assert run.speedup == pytest.approx(9.56, abs=0.005)


def test_static_tiles_can_lose_what_dynamic_tiles_win() -> None:
    grid, tile = TokenGrid(1, 16, 16), (1, 4, 4)
    static = gna_simulate(grid, (1, 8, 8), (1, 4, 4), tile, tile)
    dynamic = gna_simulate(grid, (1, 8, 8), (1, 4, 4), tile, tile, dynamic=True)
    assert (static.visited, dynamic.visited) == (9, 4)
    assert (static.perfect, dynamic.perfect) == (False, True)


def test_perfect_means_that_no_visited_tile_is_cut() -> None:
    draw = torch.Generator().manual_seed(7)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    outcomes = set()
    for _ in range(400):
        length = number(2, 24)
        window = number(2, length)
        stride, tile_q, tile_kv = number(1, window), number(1, 6), number(1, 6)
        grid = TokenGrid(1, 1, length)
        run = gna_simulate(grid, (1, 1, window), (1, 1, stride), (1, 1, tile_q), (1, 1, tile_kv))
        seen = axis_pattern(length, window, stride)
        cut = False
        for rows in seen.split(tile_q):
            cut |= any(bool(part.any()) and not bool(part.all()) for part in rows.split(tile_kv, 1))
        assert run.perfect == (not cut)
        assert run.speedup <= run.mean_speedup
        outcomes.add(run.perfect)
    assert outcomes == {True, False}


def test_lists_the_strides_that_are_perfect_on_a_grid() -> None:
    found = perfect_strides(COSMOS, ("full", 32, 48), (8, 4, 8), (4, 4, 8))
    assert (1, 8, 16) in [run.stride for run in found]
    assert all(run.perfect for run in found)
    assert all(run.speedup == pytest.approx(run.flop_speedup) for run in found)
    assert perfect_strides(TokenGrid(21, 30, 52), (7, 11, 13), (2, 8, 8), (2, 8, 8)) == []


# tiles of the canvas, window in tiles, density; canvas 18x48x80 and 30x48x80 in tiles of 6x8x8
STA_TABLE = [
    ((18, 48, 80), (3, 3, 3), 0.15),
    ((18, 48, 80), (3, 3, 5), 0.25),
    ((18, 48, 80), (3, 5, 5), 0.4167),
    ((18, 48, 80), (3, 1, 10), 0.1667),
    ((18, 48, 80), (1, 6, 10), 0.3333),
    ((30, 48, 80), (3, 3, 3), 0.09),
    ((30, 48, 80), (3, 3, 5), 0.15),
    ((30, 48, 80), (5, 6, 10), 1.0),
]


@pytest.mark.parametrize(("shape", "window", "density"), STA_TABLE)
def test_sliding_tiles_keep_the_published_share_and_cut_no_block(
    shape: tuple[int, int, int], window: tuple[int, int, int], density: float
) -> None:
    mask = STA(window=window, tile=(6, 8, 8)).mask(TokenGrid(*shape))
    assert mask.density == pytest.approx(density, abs=5e-5)
    assert mask.tiles is None


def test_sliding_tiles_follow_their_definition_tile_by_tile() -> None:
    shape, window, tile = (6, 8, 10), (3, 2, 3), (2, 2, 2)
    dense = STA(window=window, tile=tile).mask(TokenGrid(*shape)).to_dense()[0]
    place = TokenGrid(*shape).coordinates() // torch.tensor(tile)
    keep = torch.ones_like(dense)
    for axis in range(3):
        half, count = window[axis] // 2, shape[axis] // tile[axis]
        centre = place[:, axis].clamp(half, count - 1 - half)
        keep &= (centre[:, None] - place[:, axis]).abs() <= half
    assert torch.equal(dense, keep)


def test_sliding_tiles_run_on_any_grid() -> None:
    for grid in (TokenGrid(1, 3, 3), TokenGrid(5, 7, 9, 2, 3), TokenGrid(2, 1, 40)):
        mask = STA().mask(grid)
        assert bool(mask.to_dense()[0].any(1).all())
    assert 0.1 < STA().mask(TokenGrid(12, 12, 12)).density < 0.3


def test_masks_of_two_grids_do_not_mix() -> None:
    gna, first, second = GNA(), TokenGrid(2, 8, 8), TokenGrid(2, 8, 16)
    assert gna.mask(first).q_tokens == 128
    assert gna.mask(second).q_tokens == 256
    assert gna.mask(first) is gna.mask(first)


@pytest.mark.parametrize(
    "params",
    [
        {"window": -1},
        {"window": 1.5},
        {"window": (1, 2)},
        {"stride": 0},
        {"dilation": 0.5},
        {"causal": 1},
        {"tile": (2, None, 2)},
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict) -> None:
    with pytest.raises(InputError, match=f"gna: {next(iter(params))} is not usable; expected"):
        GNA(**params)
    with pytest.raises(InputError, match="sta: window is not usable; expected three whole numbers"):
        STA(window=(3, 3, 0))
    with pytest.raises(InputError, match="gna simulator: stride is not usable"):
        gna_simulate(FLUX, (1, 80, 80), (0, 1, 1), (1, 8, 8), (1, 8, 8))


def test_forecast_lists_the_perfect_strides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["forecast", "--grid", "30,48,80", "--gna-window", "18,24,24", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stride_1"]["speedup"] == pytest.approx(3.27, abs=0.005)
    assert not found["stride_1"]["perfect"]
    perfect = {tuple(row["stride"]): row for row in found["perfect"]}
    assert perfect[16, 8, 8]["speedup"] == pytest.approx(11.11, abs=0.005)
    assert (1, 8, 8) not in perfect
    with pytest.raises(SystemExit) as ended:
        main(["forecast", "--grid", "16,44,80", "--gna-window", "full,0.73,48"])
    assert ended.value.code == 0
    assert "1x1x1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--gna-window", "18,24,24"], "strides are found on a grid"),
        (["--gna-window", "18,24", "--grid", "30,48,80"], "--gna-window is not usable"),
        (["--gna-window", "18,1.5,24", "--grid", "30,48,80"], "--gna-window is not usable"),
        (["--gna-window", "18,x,24", "--grid", "30,48,80"], "--gna-window is not usable"),
        (["--gna-window", "18,24,24", "--grid", "30,48"], "--grid is not usable"),
        (["--gna-window", "18,24,24", "--grid", "3,4,5", "--method", "gna"], "without a plan"),
    ],
)
def test_unreadable_strides_are_one_line(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["forecast", *words])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert text in said
