"""Few-bit products: the specification against its formulas, groups, and who can run them."""

from dataclasses import replace

import pytest
import torch

from dittools.call import QUANTIZE, AttentionCall
from dittools.errors import InputError, UnsupportedCall
from dittools.functional import attention
from dittools.grid import TokenGrid
from dittools.kernels import choose, load
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods.paro import NAMES, PARO, head_order
from dittools.methods.quantize import fake_quant
from dittools.plans import Plan, Rule

BACKEND = ReferenceBackend()
WAYS = [name for name in QUANTIZE if name != "none"]


def call_of(grid: TokenGrid, heads: int = 2, dim: int = 32) -> AttentionCall:
    q, k, v = (torch.randn(1, grid.total, heads, dim) for _ in range(3))
    return AttentionCall(q, k, v, grid)


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, way: str) -> torch.Tensor:
    """[N, D] of one head in groups of 64, all keys kept, written down from the paper."""
    bits = 4 if way == "int4" else 8
    scores = fake_quant(q, bits, 64, 0) @ fake_quant(k, bits, 64, 0).t() * q.shape[1] ** -0.5
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    total = weights.sum(1, keepdim=True)  # of unrounded weights
    if way in ("int8", "int4"):
        weights, v = fake_quant(weights, bits, 64, 64), fake_quant(v, bits, len(v), 1)
    if way == "int8_fp8":
        scale = v.abs().amax(0) / 448
        v = (v / scale).to(torch.float8_e4m3fn).double() * scale
        weights = (weights * 448).to(torch.float8_e4m3fn).double() / 448
    return weights @ v / total


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grid", [TokenGrid(4, 6, 8), TokenGrid(3, 5, 7)], ids=str)  # ragged too
def test_the_reference_follows_the_papers_formula_in_every_order(way: str, grid: TokenGrid) -> None:
    call = call_of(grid, heads=6)
    wide = {name: getattr(call, name).double() for name in ("query", "key", "value")}
    call = replace(call, **wide)  # nothing lies on the border of two levels
    got = PARO(density=1.0, order=NAMES, quantize=way).attend(call, BACKEND)
    for head, order in enumerate(head_order(grid, list(range(6))).index):
        q, k, v = (t[0, order, head] for t in (call.query, call.key, call.value))
        torch.testing.assert_close(got[0, order, head], formula(q, k, v, way), atol=1e-9, rtol=1e-7)
    exact = BACKEND.dense(call)
    error = float((got - exact).norm() / exact.norm())
    assert {"int4": 0.02, "int8_fp8": 0.005}.get(way, 0.001) < error
    assert error < {"int4": 0.45, "int8_fp8": 0.06}.get(way, 0.03)


def local_call(grid: TokenGrid) -> AttentionCall:
    """One head that weighs keys by exp(-(0.1 df + dh + dw)): keys hold its scores, head_dim N."""
    place = grid.coordinates()
    apart = (place[:, None] - place).abs().float() * torch.tensor([0.1, 1.0, 1.0])
    query = torch.eye(grid.tokens)[None, :, None]
    key, value = -apart.sum(-1)[None, :, None], torch.randn(1, grid.tokens, 1, 64)
    return AttentionCall(
        query, key, torch.nn.functional.pad(value, (0, grid.tokens - 64)), grid, scale=1.0
    )


def test_weights_round_better_after_the_reordering() -> None:
    """The oracle: relative error of rounded weights alone, in 64 x 64 groups, by order."""
    from dittools.kernels.quantised import _round_weights

    grid = TokenGrid(16, 8, 8)
    call = local_call(grid)

    def error(name: str, way: str) -> float:
        order = head_order(grid, [NAMES.index(name)]).index[0]
        p = torch.softmax(call.key[0, order, 0][:, order], dim=-1)
        v = call.value[0, order, 0, :64]
        rounded = torch.cat([_round_weights(rows[None], 64, way)[0] for rows in p.split(64)])
        return float(((rounded - p) @ v).norm() / (p @ v).norm())

    found = {name: error(name, "int8") for name in ("fhw", "hwf", "hfw")}
    assert found == pytest.approx({"fhw": 0.0197, "hwf": 0.0093, "hfw": 0.0109}, rel=0.05)
    assert error("fhw", "int4") == pytest.approx(0.222, rel=0.05)
    assert error("hwf", "int4") == pytest.approx(0.174, rel=0.05)
    assert error("hwf", "int8_half") == 0


def test_masks_empty_rows_bias_and_lse_are_kept() -> None:
    grid = TokenGrid(2, 8, 8)
    keep = torch.zeros(1, 2, 2, dtype=torch.bool)
    keep[0, 0, 1] = True
    mask = BlockMask(keep, 64, q_tokens=128, kv_tokens=128)
    bias = torch.zeros(1, 1, 128)
    bias[..., 100:] = float("-inf")
    call = replace(call_of(grid), key_bias=bias, quantize="int8")
    out, lse = BACKEND.block_sparse(call, mask, return_lse=True)
    assert not out[:, 64:].any()
    assert torch.equal(lse[:, 64:], torch.full((1, 64, 2), float("-inf")))
    exact, sums = BACKEND.block_sparse(replace(call, quantize="none"), mask, return_lse=True)
    torch.testing.assert_close(lse[:, :64], sums[:, :64], atol=0.05, rtol=0.05)
    assert 1e-4 < float((out - exact).norm() / exact.norm()) < 0.03


def test_auto_finds_who_can_and_others_refuse_with_a_reason() -> None:
    grid = TokenGrid(4, 4, 8)
    call = replace(call_of(grid), quantize="int8")
    assert choose("auto", call).name == "reference"
    for name in ("cpu", "flex"):
        (reason,) = load(name).not_supported(call)
        assert reason == f"{name} has no products in few bits, the call asks for int8"
        assert load(name).not_supported(replace(call, quantize="none")) == []
    q, k, v = call.query, call.key, call.value
    method = PARO(density=0.5, block_size=16, quantize="int8")
    with pytest.raises(UnsupportedCall, match=r"quantize=int8 cannot run on backend cpu"):
        attention(q, k, v, grid=grid, method=method, backend="cpu")
    auto = attention(q, k, v, grid=grid, method=method)
    assert torch.equal(auto, attention(q, k, v, grid=grid, method=method, backend="reference"))
    assert not torch.equal(
        auto, attention(q, k, v, grid=grid, method=replace(method, quantize="none"))
    )
    with pytest.raises(InputError, match="quantize"):
        PARO(quantize="int3")


def test_quantised_triton_backends_run_what_they_are_made_for() -> None:
    pytest.importorskip("triton")
    call = replace(call_of(TokenGrid(4, 4, 8)), quantize="int8")
    for name, way in (("", "int8_half"), ("_int8", "int8"), ("_fp8", "int8_fp8")):
        reasons = load(f"triton_int8{name}").not_supported(call)
        assert any("the call asks int8" in r for r in reasons) == (way != "int8")
        assert not any("no products in few bits" in r for r in reasons)


def test_the_report_says_who_refused() -> None:
    from dittools.patches import attach
    from dittools.pipelines.generate import generate
    from dittools.pipelines.load import load as load_pipeline
    from dittools.pipelines.session import Request, settings_of

    settings = settings_of(Request(model="tiny/wan", prompt="a dot", steps=2))
    pipe = load_pipeline("tiny/wan")
    pipe.set_progress_bar_config(disable=True)
    plan = Plan((Rule(PARO(density=0.5, block_size=8, quantize="int8")),))
    with attach(pipe, plan, backend="cpu") as handle:
        generate(pipe, settings)
        report = handle.report()
    assert report.calls["sparse"] == 0
    (reason,) = report.fallbacks
    assert "no products in few bits, the call asks for int8" in reason
    with attach(pipe, plan) as handle:
        generate(pipe, settings)
        report = handle.report()
    assert report.backends == ["reference"]
    assert report.fallbacks == {}
    assert report.calls["sparse"] > 0
