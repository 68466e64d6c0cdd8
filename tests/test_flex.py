"""FlexAttention backend: equal to the reference on every mask, and its refusals."""

import shutil
from dataclasses import replace

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import backend_names, load
from dittools.kernels.flex import FlexBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.order import TokenOrder
from dittools.tiling import separable_mask

GRID = TokenGrid(2, 6, 7, text_after=5)


def call_of(grid: TokenGrid = GRID, extra: int = 0, **more: object) -> AttentionCall:
    q = torch.randn(2, grid.total, 2, 24)
    k, v = torch.randn(2, 2, grid.total + extra, 2, 24)
    return AttentionCall(q, k, v, grid, **more)  # type: ignore[arg-type]


def token_mask(heads: int = 2, extra: int = 0) -> BlockMask:
    dense = torch.rand(heads, GRID.total, GRID.total + extra) < 0.4
    dense[:, 3] = False  # a query that keeps nothing
    return BlockMask.from_dense(dense, 16)


def tiled_mask() -> BlockMask:
    axes = [torch.eye(n, dtype=torch.bool) | (torch.rand(n, n) < 0.5) for n in GRID.shape]
    return separable_mask(GRID, (axes[0], axes[1], axes[2]), (2, 2, 4))


def ordered(mask: BlockMask, heads: int) -> BlockMask:
    index = torch.stack([torch.randperm(GRID.total) for _ in range(heads)])
    return replace(mask, order=TokenOrder(index, GRID.total), _cache={})


def cases() -> dict[str, tuple[AttentionCall, BlockMask]]:
    torch.manual_seed(1)
    dropped = torch.ones(2, GRID.total, dtype=torch.bool)
    dropped[0, -3:] = False
    whole = BlockMask(torch.rand(2, 6, 6) < 0.5, 16, q_tokens=GRID.total, kv_tokens=GRID.total)
    return {
        "tokens": (call_of(), token_mask()),
        "shared": (call_of(scale=0.4), token_mask(heads=1)),
        "blocks": (call_of(), whole),
        "no-length-given": (call_of(), BlockMask(torch.rand(1, 6, 6) < 0.5, 16)),
        "order-per-head": (
            call_of(key_bias=torch.randn(1, 2, GRID.total)),
            ordered(token_mask(), 2),
        ),
        "padded-tiles": (call_of(key_mask=dropped), tiled_mask()),
        "longer-keys": (
            call_of(extra=9, key_bias=torch.randn(2, 1, GRID.total + 9)),
            token_mask(extra=9),
        ),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_flex_equals_the_reference(name: str) -> None:
    call, mask = cases()[name]
    assert FlexBackend(compiled=False).not_supported(call, mask) == []
    out, lse = FlexBackend(compiled=False).block_sparse(call, mask, return_lse=True)
    want, want_lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-6)


def test_flex_mask_is_made_once_per_mask_and_size() -> None:
    backend, mask = FlexBackend(compiled=False), token_mask()
    first = backend._flex_mask(mask, call_of())
    assert backend._flex_mask(mask, call_of()) is first
    assert backend._flex_mask(token_mask(), call_of()) is not first


def test_flex_refuses_with_the_reason() -> None:
    call, mask = call_of(), token_mask()
    wide = replace(
        call, query=call.query.double(), key=call.key.double(), value=call.value.double()
    )
    assert "got torch.float64" in FlexBackend(compiled=False).not_supported(wide, mask)[0]
    long = TokenGrid(1, 1, 5000)
    tensor = torch.zeros(1, 5000, 1, 2)
    reasons = FlexBackend(compiled=False).not_supported(AttentionCall(tensor, tensor, tensor, long))
    assert "at most 4096 tokens, got 5000" in reasons[0]
    graph = replace(call, value=call.value.clone().requires_grad_())
    assert FlexBackend().not_supported(graph, mask) == ["flex has no backward pass on the CPU"]
    with torch.no_grad():
        assert FlexBackend().not_supported(graph, mask) == []
    with pytest.raises(UnsupportedCall, match="no log-sum-exp"):
        FlexBackend(compiled=True).block_sparse(call, mask, return_lse=True)


def test_flex_is_a_backend_by_name() -> None:
    assert "flex" in backend_names()
    assert load("flex").name == "flex"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
@pytest.mark.parametrize("name", list(cases()))
def test_compiled_flex_equals_the_reference(name: str) -> None:
    call, mask = cases()[name]
    out = FlexBackend(compiled=True).block_sparse(call, mask)
    torch.testing.assert_close(
        out, ReferenceBackend().block_sparse(call, mask), rtol=1e-4, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", list(cases()))
def test_flex_equals_the_reference_on_the_device(name: str) -> None:
    call, mask = cases()[name]
    tensors = {n: getattr(call, n).cuda().half() for n in ("query", "key", "value")}
    more = {n: getattr(call, n) for n in ("key_bias", "key_mask")}
    moved = replace(call, **tensors, **{n: t if t is None else t.cuda() for n, t in more.items()})
    out = FlexBackend().block_sparse(moved, mask)
    want = ReferenceBackend().block_sparse(moved, mask)
    torch.testing.assert_close(out, want, rtol=1e-2, atol=4e-3)
