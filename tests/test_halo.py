"""Halo exchange: ranks that hold bands of an image and fetch rows around make the same image."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import OLD, shared

import dittools
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.methods.halo import band_mask, band_refusal, band_scale, key_rows
from dittools.patches.halo import Bands, find_bands, halo_refusal
from dittools.patches.sites import ORIGINALS, SeamCall
from dittools.patches.split import Split, piece
from dittools.plans import Plan, Rule

ROOT = Path(__file__).parents[1]
SMALL = {"block_size": 16}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("clear", {"radius": 2.0}),
    ("clear", {"radius": 0.3}),
    ("clear", {"radius": 0.01}),
    ("gna", {"window": (1, 3, 3), "stride": 1}),
    ("gna", {"window": ("full", 0.4, 0.5)}),
    ("gna", {"window": (1, 4, 4), "dilation": (1, 2, 1), "stride": 1}),
    ("gna", {"window": (1, 5, 3), "causal": (False, True, False), "stride": (1, 4, 2)}),
]


def _bands(count: int, ranks: int) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(piece(count, rank, ranks) for rank in range(ranks)))
    return list(zip([0, *ends], ends, strict=False))


# --- masks of a band


@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize(
    "grid", [TokenGrid(1, 10, 12, 5), TokenGrid(1, 7, 9, 0, 3), TokenGrid(1, 16, 16)]
)
def test_a_band_sees_what_it_sees_in_the_whole_image(
    method: str, params: dict[str, Any], grid: TokenGrid
) -> None:
    """Bands need not end with a row; more rows than needed change nothing."""
    chosen: Any = build(method, {**params, **SMALL})
    dense, width, text = chosen.mask(grid).to_dense()[0], grid.width, grid.text_before
    for ranks in (2, 3, 4):
        for own in _bands(grid.tokens, ranks):
            near = key_rows(chosen, grid, (own[0] // width, -(-own[1] // width)))
            for rows in (near, (0, grid.height)):
                first, behind = rows[0] * width, rows[1] * width
                there = torch.zeros(grid.total, dtype=torch.bool)
                there[:text] = there[text + grid.tokens :] = True
                there[text + first : text + behind] = True
                whole = dense[text + own[0] : text + own[1]]
                start = text + own[0] - first
                mask = band_mask(chosen, grid, rows, own)
                band = mask.to_dense()[0, start : start + own[1] - own[0]]
                assert torch.equal(band, whole[:, there])
                assert not whole[:, ~there].any()


def test_a_band_costs_its_share() -> None:
    """Rows around a band answer, they do not ask: their blocks are left out."""
    grid, chosen = TokenGrid(1, 64, 16, 16), build("clear", {"radius": 8.0, **SMALL})
    whole = chosen.mask(grid)  # type: ignore[attr-defined]
    rows = key_rows(chosen, grid, (16, 32))  # type: ignore[arg-type]
    assert rows == (9, 39)
    part = band_mask(chosen, grid, rows, (256, 512))  # type: ignore[arg-type]
    asking = part.keep.any(2).sum()
    assert 16 <= int(asking) <= 20  # of 64: the band need not begin with a tile
    assert int(part.keep.sum()) / int(asking) < 1.1 * int(whole.keep[:, :-1].sum()) / 64


def test_scores_are_scaled_for_the_whole_sequence() -> None:
    chosen: Any = build("clear", {"radius": 2.0, "proportional": True, "trained_tokens": 40})
    q = torch.randn(1, 5, 2, 8)
    call = dittools.call.AttentionCall(q, q, q, TokenGrid(1, 1, 5))
    scaled = band_scale(chosen, call, None, 1600)
    assert scaled.softmax_scale == pytest.approx(2**0.5 * 8**-0.5)
    assert band_scale(build("gna", {}), call, 0.5, 1600).softmax_scale == 0.5  # type: ignore[arg-type]


def test_methods_that_look_at_the_whole_image_are_refused() -> None:
    image = TokenGrid(1, 8, 8)
    assert band_refusal(build("gna", {}), image) == ""
    assert "whole image" in band_refusal(build("dense", {}), image)
    assert "whole image" in band_refusal(build("sparge", {}), image)
    assert "pooled" in band_refusal(build("clear", {"down_factor": 2}), image)
    assert "video" in band_refusal(build("gna", {}), TokenGrid(2, 8, 8))


def test_calls_that_bands_cannot_run_are_refused() -> None:
    number = ORIGINALS.add(lambda q, *_, **__: q, heads_first=False)
    q = torch.zeros(1, 8, 2, 8)
    call = SeamCall(q, q, q, {}, number)
    masked = SeamCall(q, q, q, {"attn_mask": torch.ones(1, 8)}, number)
    rules = [((0, 1), build("gna", {}))]
    grid = TokenGrid(1, 4, 4, 4)
    split = Split((grid,), (4, 16), 2)
    assert halo_refusal(call, split, rules) == ""
    assert "mask" in halo_refusal(masked, split, rules)
    assert "rows of the batch" in halo_refusal(call, Split((grid, grid), (4, 16), 2), rules)
    both = Split((TokenGrid(1, 4, 4, 2, 2),), (2, 16, 2), 2)
    assert "both sides" in halo_refusal(call, both, rules)
    assert "more ranks" in halo_refusal(call, Split((TokenGrid(1, 1, 2),), (2,), 3), rules)
    assert "whole image" in halo_refusal(call, split, [((0, 1), build("dense", {}))])


def test_an_exchange_nobody_knows_is_refused() -> None:
    with pytest.raises(InputError, match="heads or halo; got 'ring'"):
        dittools.attach(shared("flux"), "clear", exchange="ring")


# --- real ranks

WIDE = {"height": 20, "width": 24, "num_inference_steps": 2}  # 10 x 12 tokens beside 16 of text
TALL = {"height": 22, "width": 24, "num_inference_steps": 2, "max_sequence_length": 13}  # 11 x 12


def _plan(folder: Path, name: str, *rules: tuple[str, dict[str, Any], Any]) -> str:
    made = Plan(tuple(Rule(build(m, {"block_size": 8, **p}), heads=h) for m, p, h in rules))
    return str(made.save(folder / f"{name}.json"))


def _jobs(folder: Path) -> list[dict[str, Any]]:
    clear = _plan(folder, "clear", ("clear", {"radius": 2.0}, "all"))
    gna = _plan(folder, "gna", ("gna", {"window": (1, 3, 5), "stride": 1}, "all"))
    mixed = _plan(
        folder,
        "mixed",
        ("clear", {"radius": 3.0, "proportional": True}, (0, 3)),
        ("gna", {"window": ("full", 0.3, 0.5)}, (1, 2, 4)),
    )
    partly = _plan(folder, "partly", ("clear", {"radius": 2.0}, (0, 3)))
    halo = {"family": "flux", "heads": 8, "call": WIDE, "exchange": "halo"}
    return [
        {"name": "clear", **halo, "plan": clear},
        {"name": "gna cpu", **halo, "plan": gna, "backend": "auto"},
        # 5 heads, which Ulysses could not share
        {"name": "mixed", **halo, "heads": 5, "plan": mixed, "stock": False},
        {"name": "partly", **halo, "plan": partly},
        {"name": "tall", **halo, "call": TALL, "plan": gna, "anything": True},
    ]


def _run(folder: Path, jobs: list[dict[str, Any]], ranks: int) -> dict[str, list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        from ulysses_ranks import run_ranks
    return run_ranks(folder, jobs, ranks)  # type: ignore[no-any-return]


def _check(found: dict[str, list[Any]], ranks: int) -> None:
    for name, each in found.items():
        for rank, one in enumerate(each):
            assert one["error"] < 2e-6, (name, rank, one["error"])
            assert one["sparse_gap"] > 1e-4  # far from dense
            assert one["single"]["calls"]["sparse"] in (4, 8)
            if name == "partly":  # a rank may be dealt dense heads alone
                continue
            assert one["report"]["calls"] == one["single"]["calls"]
            assert f"rank {rank} of {ranks} (halo of rows)" in one["text"]
            assert one["report"]["density"] == pytest.approx(one["single"]["density"])
            assert "all_to_all" not in one["sent"]
            assert not one["report"]["fallbacks"]
        if name == "partly":
            assert any("not a halo: dense looks" in text for text in each[0]["report"]["fallbacks"])
            assert each[0]["sent"]["all_to_all"] == each[0]["stock_sent"]["all_to_all"]


def _bytes(bands: Bands, rank: int, channels: int, heads: int) -> tuple[int, int]:
    """Return what one call sends in rows and partial text, and in text that is gathered."""
    others = [other for other in range(len(bands.own)) if other != rank]
    rows = sum(max(high - low, 0) for low, high in (bands.overlap(rank, o) for o in others))
    text = sum(bands.text[other] for other in others)
    return (
        4 * (2 * rows * channels + text * (channels + heads)),
        4 * 3 * max(bands.text) * channels * len(others),
    )


@pytest.mark.skipif(OLD, reason="diffusers is too old")
def test_two_ranks_with_a_halo_make_the_image_of_one(tmp_path: Path) -> None:
    found = _run(tmp_path, _jobs(tmp_path), 2)
    _check(found, 2)
    bands = find_bands(
        Split((TokenGrid(1, 10, 12, 16),), (16, 120), 2), [build("clear", {"radius": 2.0})]
    )
    assert bands.rows == ((0, 6), (4, 10))
    for rank, one in enumerate(found["clear"]):
        rows, text = _bytes(bands, rank, 128, 8)
        assert one["sent"]["send"] == 4 * rows
        assert one["sent"]["all_gather"] - one["stock_sent"]["all_gather"] == 4 * text
        told = sum(one["sent"].values())
        assert told < one["socket"] < 1.1 * told
        assert told < sum(one["stock_sent"].values()) / 2


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="diffusers is too old")
def test_four_ranks_with_a_halo_make_the_image_of_one(tmp_path: Path) -> None:
    """Bands of 2.5 rows, halos that reach over two ranks, text that does not divide, no text."""
    jobs = [job for job in _jobs(tmp_path) if job["name"] != "mixed"]
    clear = {**jobs[0], "plan": _plan(tmp_path, "near", ("clear", {"radius": 2.0}, "all"))}
    qwen = {"height": 64, "width": 64, "negative_prompt": "a cat on a blue square"}
    wan = {"height": 64, "width": 64, "num_frames": 1}
    for family, call in (("flux2", WIDE), ("qwen_image", qwen), ("wan", wan)):
        call = {"num_inference_steps": 2, **call}
        anything = family == "qwen_image"
        more = {"name": family, "family": family, "call": call, "anything": anything}
        jobs.append({**clear, **more})
    found = _run(tmp_path, jobs, 4)
    far = _plan(tmp_path, "far", ("clear", {"radius": 6.0}, "all"))
    job = {"name": "far", "family": "flux", "heads": 6, "call": WIDE, "exchange": "halo"}
    (tmp_path / "far").mkdir()
    found |= _run(tmp_path / "far", [{**job, "plan": far, "stock": False}], 4)
    _check(found, 4)
