"""Radial attention against the authors' block rule, and the counts their code gives."""

import time

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.radial import Radial


def grid_of(frames: int, tokens: int, before: int = 0, after: int = 0) -> TokenGrid:
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    return TokenGrid(frames, height, tokens // height, before, after)


def official_map(grid: TokenGrid, radial: Radial) -> torch.Tensor:
    """The authors' rounding done the long way: a zero canvas per frame pair, cut into blocks."""
    f, t, size = grid.frames, grid.tokens_per_frame, radial.block_size
    blocks = grid.blocks(size)
    keep = torch.zeros((blocks, blocks), dtype=torch.bool)
    power = 2 ** (t.bit_length() - 1)
    place = torch.arange(t)
    span = -(-t // size)
    for i in range(f):
        for j in range(f):
            d = abs(i - j)
            ref = power / 2 ** (d.bit_length() - 1) if d else power
            band = torch.zeros((t, t), dtype=torch.bool)
            if radial.sink and j == 0:
                band[:] = True
            elif d == 0 or ref >= 128 or d % int(128 / ref) == 0:
                width = max(radial.decay * ref, size)
                if d < 2:
                    width = t if d == 0 or radial.first_distance == "t" else t // 2
                band = (place[:, None] - place).abs() <= width
            r0, c0 = i * t % size, j * t % size
            canvas = torch.zeros((r0 + span * size, c0 + span * size))
            canvas[r0 : r0 + t, c0 : c0 + t] = band[: canvas.shape[0] - r0, : canvas.shape[1] - c0]
            for a in range(span):
                for b in range(span):
                    block = canvas[a * size : (a + 1) * size, b * size : (b + 1) * size]
                    filled = block.sum(0)
                    high, some = (filled / size > 1 / 3).sum(), (filled > 0).sum()
                    row, column = i * t // size + a, j * t // size + b
                    if some > 0 and high / some > 0.6 and max(row, column) < blocks:
                        keep[row, column] = True
    keep[grid.tokens // size :] = True
    keep[:, grid.tokens // size :] = True
    return keep


ROWS = [  # f, t, block, decay, sink, rule, kept, total: counts of the authors' code
    (18, 3840, 128, 0.2, True, "t", 83_728, 291_600),
    (18, 3840, 128, 0.2, True, "t/2", 76_798, 291_600),
    (21, 1560, 128, 0.2, True, "t", 22_534, 65_536),
    (21, 1560, 128, 1.0, True, "t", 29_442, 65_536),
    (30, 3840, 128, 0.95, False, "t", 222_452, 810_000),
    (8, 512, 128, 1.0, True, "t", 888, 1_024),
    (8, 512, 128, 0.5, True, "t", 808, 1_024),
    (16, 512, 128, 0.5, True, "t", 2_640, 4_096),
    (40, 256, 128, 0.5, True, "t", 2_612, 6_400),
    (40, 256, 64, 0.5, True, "t", 7_466, 25_600),
    (6, 200, 64, 0.5, True, "t", 293, 361),
    (1, 1024, 128, 0.5, True, "t", 64, 64),
]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}x{row[1]}-{row[2]}-{row[3]}")
def test_keeps_as_many_blocks_as_the_authors_code(row: tuple, safe: bool) -> None:
    f, t, block, decay, sink, rule, kept, total = row
    radial = Radial(decay=decay, block_size=block, sink=sink, first_distance=rule, safe=safe)
    mask = radial.mask(grid_of(f, t))
    assert (int(mask.keep.sum()), mask.keep.numel()) == (kept, total)
    assert mask.density == pytest.approx(kept / total)


def test_text_behind_the_video_is_dense_both_ways() -> None:
    mask = Radial(decay=0.95, sink=False).mask(grid_of(30, 3840, after=256))
    assert int(mask.keep.sum()) == 226_056
    assert mask.keep.numel() == 813_604
    mask = Radial(decay=0.5, sink=False).mask(grid_of(8, 512, after=256))
    assert (int(mask.keep.sum()), int(mask.keep[:, :32, :32].sum())) == (904, 772)


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_authors_rounding_on_odd_sizes(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(values: list) -> object:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    grid = grid_of(
        pick([1, 2, 3, 5, 9]), pick([6, 32, 42, 100, 128, 150, 200, 260]), after=pick([0, 5, 70])
    )
    radial = Radial(
        decay=pick([0.2, 0.5, 1.0]),
        block_size=pick([16, 32, 64, 128]),
        sink=pick([True, False]),
        first_distance=pick(["t", "t/2"]),
        safe=False,
    )
    expected = official_map(grid, radial)
    if grid.frames == 1:
        expected[:] = True
    assert torch.equal(radial.mask(grid).keep[0], expected)


def test_safe_adds_to_the_authors_mask_and_never_leaves_a_token_without_itself() -> None:
    empty = Radial(safe=False).mask(grid_of(8, 32)).keep
    assert int(empty.sum()) == 0  # as the authors' code: a softmax over nothing
    for frames, tokens, rule in ((8, 32, "t"), (64, 42, "t"), (9, 150, "t/2"), (5, 3600, "t/2")):
        grid = grid_of(frames, tokens)
        official = Radial(first_distance=rule, safe=False).mask(grid).keep[0]
        safe = Radial(first_distance=rule).mask(grid).keep[0]
        assert bool((safe | ~official).all())
        assert bool(safe.diagonal().all())


def test_safe_shows_frame_edges_their_own_frame() -> None:
    grid = TokenGrid(6, 45, 80)  # 3,600 tokens a frame, 16 past a block: the glitch at 720p
    segments = grid.segments(128)
    share = {}
    for safe in (False, True):
        keep = Radial(first_distance="t/2", safe=safe).mask(grid).keep[0]
        own = segments.frame[:, None] == segments.frame
        length = (segments.last - segments.first + 1).float()
        seen = keep[segments.block][:, segments.block] & own
        share[safe] = float(((seen * length).sum(1) / 3600).min())
    assert share[False] < 0.6
    assert share[True] == 1.0


def test_is_symmetric_without_sink_and_grows_with_decay() -> None:
    grid = grid_of(12, 512)
    keep = Radial(sink=False).mask(grid).keep[0]
    assert torch.equal(keep, keep.t())
    counts = [int(Radial(decay=d).mask(grid).keep.sum()) for d in (0.1, 0.3, 0.6, 1.0, 2.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert bool((Radial().mask(grid).keep >= Radial(first_distance="t/2").mask(grid).keep).all())


@pytest.mark.parametrize(("frames", "tokens", "block"), [(12, 64, 32), (20, 42, 16), (9, 100, 32)])
def test_the_largest_decay_fills_every_pair_of_frames_that_takes_part(
    frames: int, tokens: int, block: int
) -> None:
    """keep(d): all distances while a band of 2**floor(log2 t) / 2**floor(log2 d) fills a block of
    128, then every (128 / band)-th.
    """
    grid = grid_of(frames, tokens)
    keep = Radial(decay=64.0, sink=False, block_size=block, safe=False).mask(grid).keep[0]
    power = 2 ** (tokens.bit_length() - 1)
    dropped = 0
    for i in range(frames):
        for j in range(frames):
            apart = abs(i - j)
            band = power / 2 ** (apart.bit_length() - 1) if apart else power
            takes_part = apart == 0 or band >= 128 or apart % int(128 / band) == 0
            inside = [slice(-(-n * tokens // block), (n + 1) * tokens // block) for n in (i, j)]
            whole = keep[inside[0], inside[1]]  # blocks that lie in this pair of frames alone
            assert bool((whole == takes_part).all()), (i, j)
            dropped += whole.numel() * (not takes_part)
    assert dropped > 0


def test_one_or_two_frames_see_everything() -> None:
    assert bool(Radial().mask(grid_of(1, 300)).keep.all())
    assert bool(Radial().mask(grid_of(2, 200)).keep.all())
    call = call_of(grid_of(1, 300))
    assert Radial().not_supported(call) == ["radial needs 2 frames or more, got 1"]
    backend = ReferenceBackend()
    assert torch.equal(Radial().attend(call, backend), backend.dense(call))


def call_of(grid: TokenGrid, batch: int = 1) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, 2, 8) for _ in range(3))
    return AttentionCall(q, k, v, grid)


@pytest.mark.parametrize("before", [0, 13])
@pytest.mark.parametrize("after", [0, 7, 256])
def test_attention_is_sdpa_under_the_expanded_mask(before: int, after: int) -> None:
    grid = TokenGrid(6, 9, 11, before, after)
    radial = Radial(decay=0.2, block_size=16)
    call, allowed = call_of(grid, batch=2), radial.mask(grid).to_dense()
    assert not bool(allowed.all())
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    got = radial.attend(call, ReferenceBackend())
    torch.testing.assert_close(got, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(13, 0), (13, 7), (0, 7)])
def test_text_rows_and_columns_are_dense_and_leading_text_changes_nothing_else(
    before: int, after: int
) -> None:
    radial = Radial(block_size=16)
    dense = radial.mask(TokenGrid(6, 9, 11, before, after)).to_dense()[0]
    text = torch.ones(len(dense), dtype=torch.bool)
    text[before : before + 6 * 99] = False
    assert bool(dense[text].all())
    assert bool(dense[:, text].all())
    behind = radial.mask(TokenGrid(6, 9, 11, 0, before + after)).to_dense()[0]
    video = slice(before, before + 6 * 99)
    assert torch.equal(dense[video, video], behind[: 6 * 99, : 6 * 99])


def test_masks_of_two_grids_do_not_mix_and_are_built_once() -> None:
    radial, first, second = Radial(block_size=32), grid_of(5, 96), grid_of(5, 128)
    a, b = radial.mask(first), radial.mask(second)
    assert (a.keep.shape[1], b.keep.shape[1]) == (15, 20)
    assert radial.mask(first) is a
    assert Radial(block_size=32, decay=0.9).mask(first) is not a


def test_a_720p_clip_takes_under_a_second() -> None:
    start = time.process_time()
    mask = Radial(decay=0.21).mask(TokenGrid(21, 45, 80))  # 75,600 tokens
    assert time.process_time() - start < 1.0
    assert 0.2 < mask.density < 0.3


@pytest.mark.parametrize(
    "params",
    [
        {"decay": 0},
        {"decay": float("nan")},
        {"block_size": 1.5},
        {"first_distance": "2t"},
        {"sink": 1},
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict) -> None:
    with pytest.raises(InputError, match=f"radial: {next(iter(params))} is not usable; expected"):
        Radial(**params)
