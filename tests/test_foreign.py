"""Adapters to foreign kernels: what they hand over, what they refuse; NATTEN against itself."""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import backend_names, choose, foreign, load
from dittools.kernels.foreign import FlashBackend, NattenBackend, SageBackend, SpargeBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.kernels.windows import Windows, axis_window, windows_of
from dittools.mask import BlockMask
from dittools.order import TokenOrder
from dittools.tiling import separable_mask

HALF = torch.bfloat16
NAMES = ("sage", "sparge", "natten", "flash")


def call_of(grid: TokenGrid, dim: int = 64, dtype: torch.dtype = HALF) -> AttentionCall:
    q, k, v = (torch.randn(1, grid.total, 2, dim).to(dtype) for _ in range(3))
    return AttentionCall(q, k, v, grid)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, S, D] in fp32 and the log-sum-exp [B, H, S]."""
    score = q.float() @ k.float().transpose(-1, -2) * scale
    return score.softmax(-1) @ v.float(), score.logsumexp(-1)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "DEVICES", ("cpu",))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> object:
    """Install a module of a given name, as if the package were there."""

    def install(name: str, **functions: object) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.mark.parametrize("name", NAMES)
def test_adapters_load_without_their_package_and_say_it_is_missing(name: str) -> None:
    assert name in backend_names()
    backend = load(name)
    if importlib.util.find_spec(backend.package) is not None:  # type: ignore[attr-defined]
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UnsupportedCall, match=r"is not installed.*runs on cuda, got cpu"):
        choose(name, call_of(TokenGrid(1, 8, 16)))
    with pytest.raises(UnsupportedCall, match="is not installed"):
        backend.dense(call_of(TokenGrid(1, 8, 16)))


@pytest.mark.parametrize("name", NAMES)
def test_adapters_refuse_dtypes_and_biases(name: str) -> None:
    call = call_of(TokenGrid(1, 8, 16), dtype=torch.float64)
    call = replace(call, key_mask=torch.ones(1, 128, dtype=torch.bool))
    reasons = "; ".join(load(name).not_supported(call))
    assert "got torch.float64" in reasons
    assert "takes no per-key mask or bias" in reasons


def test_sage_gets_tokens_first_and_returns_its_own_lse(stand_in: object) -> None:
    def sageattn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float = 1.0, return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        assert tensor_layout == "NHD"
        assert not is_causal
        assert return_lse
        out, lse = exact(*(t.transpose(1, 2) for t in (q, k, v)), sm_scale)
        return out.to(q.dtype).transpose(1, 2), lse

    stand_in("sageattention", sageattn=sageattn)  # type: ignore[operator]
    check_dense_kernel(SageBackend())


def test_flash_gets_tokens_first_and_returns_its_own_lse(stand_in: object) -> None:
    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        softmax_scale: float, causal: bool, return_attn_probs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
        assert not causal
        assert return_attn_probs
        out, lse = exact(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale)
        return out.to(q.dtype).transpose(1, 2), lse, None

    stand_in("flash_attn", flash_attn_func=flash_attn_func)  # type: ignore[operator]
    check_dense_kernel(FlashBackend())


def check_dense_kernel(backend: SageBackend | FlashBackend) -> None:
    grid = TokenGrid(1, 8, 12)
    call = replace(call_of(grid), scale=0.2)
    mask = BlockMask.full(grid.total, grid.total, 32)
    assert backend.not_supported(call, mask) == []
    want, want_lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
    out, lse = backend.block_sparse(call, mask, return_lse=True)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backend.dense(call), want, rtol=2e-2, atol=1e-2)
    keep = mask.keep.clone()
    keep[0, 0, 1] = False
    mask = replace(mask, keep=keep, _cache={})
    with pytest.raises(UnsupportedCall, match="computes every pair and this mask drops some"):
        backend.block_sparse(call, mask)


def sparge_stand_in(stand_in: object) -> None:
    def block_sparse_sage2_attn_cuda(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        mask_id: torch.Tensor, scale: float, tensor_layout: str,
    ) -> torch.Tensor:  # fmt: skip
        assert tensor_layout == "HND"
        assert mask_id.dtype == torch.int8
        keep = mask_id.bool().repeat_interleave(128, 2).repeat_interleave(64, 3)
        keep = keep[:, :, : q.shape[2], : k.shape[2]]
        score = (q.float() @ k.float().transpose(2, 3) * scale).masked_fill(~keep, float("-inf"))
        return (score.softmax(-1) @ v.float()).half()

    stand_in("spas_sage_attn", block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda)  # type: ignore[operator]


@pytest.mark.parametrize("block", [(128, 64), 128, (256, 128)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_sparge_gets_the_mask_in_its_own_blocks(
    block: int | tuple[int, int], shuffled: bool, stand_in: object
) -> None:
    sparge_stand_in(stand_in)
    grid = TokenGrid(1, 23, 29)  # 667 tokens: ragged in every block size
    q_block, kv_block = block if isinstance(block, tuple) else (block, block)
    keep = torch.rand(2, -(-grid.total // q_block), -(-grid.total // kv_block)) < 0.5
    keep[..., 0] = True
    order = TokenOrder(torch.randperm(grid.total)[None], grid.total) if shuffled else None
    mask = BlockMask(keep, block, order=order, q_tokens=grid.total, kv_tokens=grid.total)
    call = call_of(grid)
    assert SpargeBackend().not_supported(call, mask) == []
    out = SpargeBackend().block_sparse(call, mask)
    want = ReferenceBackend().block_sparse(call, mask)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
    assert out.dtype == call.query.dtype


def test_sparge_refuses_what_its_blocks_cannot_say(stand_in: object) -> None:
    sparge_stand_in(stand_in)
    grid = TokenGrid(1, 16, 16)
    call = call_of(grid)
    fine = BlockMask(torch.ones(1, 4, 4, dtype=torch.bool), 64, q_tokens=256, kv_tokens=256)
    assert (
        "keeps blocks of 128 x 64, the mask's are 64"
        in SpargeBackend().not_supported(call, fine)[0]
    )
    empty = BlockMask(torch.tensor([[[True, True], [False, False]]]), 128)
    assert "some rows of this mask are empty" in SpargeBackend().not_supported(call, empty)[0]
    cut = BlockMask.from_dense(torch.rand(1, 256, 256) < 0.9, 128)
    assert "keeps whole blocks" in SpargeBackend().not_supported(call, cut)[0]
    with pytest.raises(UnsupportedCall, match="no dependable log-sum-exp"):
        SpargeBackend().block_sparse(call, BlockMask.full(256, 256, 128), return_lse=True)
    small = call_of(TokenGrid(1, 8, 8), dim=96)
    reasons = "; ".join(SpargeBackend().not_supported(small))
    assert "head_dim 64 or 128, got 96" in reasons
    assert "128 tokens or more" in reasons


def window_mask(
    grid: TokenGrid, window: tuple[int, ...], stride: tuple[int, ...], tile: tuple[int, int, int]
) -> BlockMask:
    axes = [axis_window(*sizes) for sizes in zip(grid.shape, window, stride, strict=True)]
    return separable_mask(grid, (axes[0], axes[1], axes[2]), tile)


WINDOWED = [
    (TokenGrid(3, 6, 7), (2, 3, 5), (1, 1, 1), (2, 2, 4)),
    (TokenGrid(4, 8, 8), (4, 4, 4), (1, 2, 4), (1, 4, 4)),
    (TokenGrid(1, 9, 11), (1, 5, 6), (1, 2, 3), (1, 4, 4)),
    (TokenGrid(5, 6, 6), (3, 6, 6), (3, 1, 1), (1, 4, 8)),
]


@pytest.mark.parametrize(("grid", "window", "stride", "tile"), WINDOWED)
def test_windows_are_read_off_the_mask(
    grid: TokenGrid, window: tuple[int, ...], stride: tuple[int, ...], tile: tuple[int, int, int]
) -> None:
    found = windows_of(window_mask(grid, window, stride, tile), grid)
    assert isinstance(found, Windows), found
    full = [axis for axis, side in enumerate(grid.shape) if side > 1]
    assert found.axes == tuple(grid.shape[a] for a in full)
    assert found.window == tuple(window[a] for a in full)
    for place, axis in enumerate(full):  # several strides may name one and the same window
        again = axis_window(grid.shape[axis], window[axis], found.stride[place])
        assert torch.equal(again, axis_window(grid.shape[axis], window[axis], stride[axis]))


def test_a_window_with_one_pair_changed_is_no_window() -> None:
    grid, window, stride, tile = WINDOWED[0]
    mask = window_mask(grid, window, stride, tile)
    assert mask.tiles is not None
    mask.tiles[0, 0, 0] ^= 1
    assert "not one" in windows_of(mask, grid)
    mask = window_mask(grid, window, stride, tile)
    mask.keep[0, 0, -1] = ~mask.keep[0, 0, -1]
    assert isinstance(windows_of(mask, grid), str)


def test_masks_that_are_no_windows_are_refused_with_the_reason() -> None:
    grid = TokenGrid(2, 4, 4)
    full = BlockMask.full(32, 32, 16)
    assert "not cut into tiles" in windows_of(full, grid)
    assert "no text tokens" in windows_of(full, TokenGrid(2, 4, 4, text_after=3))
    axes = [torch.rand(n, n) < 0.5 for n in grid.shape]
    odd = separable_mask(grid, (axes[0], axes[1], axes[2]), (1, 4, 4))
    assert "without dilation or causality" in windows_of(odd, grid)


def test_natten_gets_the_grid_and_the_windows(stand_in: object) -> None:
    grid, window, stride, tile = WINDOWED[2]
    seen = {}

    def na2d(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> object:
        seen.update(more, shape=tuple(q.shape))
        return q, torch.zeros(q.shape[:-1])

    stand_in("natten", na2d=na2d)  # type: ignore[operator]
    call = call_of(grid)
    out, lse = NattenBackend().block_sparse(
        call, window_mask(grid, window, stride, tile), return_lse=True
    )
    assert seen["shape"] == (1, 9, 11, 2, 64)
    assert seen["kernel_size"] == (5, 6)
    assert torch.equal(out, call.query)
    assert lse.shape == (1, grid.total, 2)
    NattenBackend().dense(call)
    assert seen["kernel_size"] == (9, 11)


@pytest.mark.oracle
@pytest.mark.parametrize(("grid", "window", "stride", "tile"), WINDOWED)
def test_natten_itself_agrees_with_the_mask(
    grid: TokenGrid,
    window: tuple[int, ...],
    stride: tuple[int, ...],
    tile: tuple[int, int, int],
    on_cpu: None,
) -> None:
    pytest.importorskip("natten", reason="natten is not installed: make test-oracles")
    mask, call = window_mask(grid, window, stride, tile), call_of(grid, dim=16, dtype=torch.float32)
    assert NattenBackend().not_supported(call, mask) == []
    out, lse = NattenBackend().block_sparse(call, mask, return_lse=True)
    want, want_lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=2e-6)
