"""Attention on plain tensors, without a pipeline."""

import warnings

import torch

from dittools.call import AttentionCall
from dittools.errors import InputError, UnknownMethod, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import choose
from dittools.kernels.auto import resolve
from dittools.mask import BlockMask
from dittools.methods import Method, build


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    grid: TokenGrid,
    method: str | Method = "dense",
    backend: str = "auto",
    layer: int = 0,
    step: int = 0,
    steps: int = 0,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [B, S, H, D]: attention as a method approximates it.

    A method that does not fit the call (one frame, say) runs dense and warns why.

    Args:
        query: [B, S, H, D], S = grid.total, text before and after as the grid says.
        key: as query.
        value: as query.
        grid: geometry of the sequence.
        method: name in METHODS, or a configured method.
        backend: name in `dittools.kernels.backend_names()`.
        layer: for methods that vary over layers.
        step: denoising step, from 0.
        steps: steps of the run, 0 when unknown.
        scale: factor on the scores; None means D ** -0.5.
        key_mask: bool [B, S], False drops a key.
    Raises:
        InputError: the grid is none.
        UnknownMethod: no such method.
        UnsupportedCall: shapes do not fit, or the named backend cannot run the call.
    """
    chosen = build(method, {}) if isinstance(method, str) else method
    if isinstance(chosen, type) or not isinstance(chosen, Method):
        raise UnknownMethod(
            "this is no method",
            expected="a method name or a configured method",
            got=repr(method),
        )
    if not isinstance(grid, TokenGrid):
        raise InputError("this is no grid", expected="a TokenGrid", got=type(grid).__name__)
    call = AttentionCall(
        query,
        key,
        value,
        grid,
        layer=layer,
        step=step,
        steps=steps,
        scale=scale,
        key_mask=key_mask,
    )
    if key.shape[1] != query.shape[1]:
        raise UnsupportedCall(
            "a method needs the keys of the same sequence",
            expected=f"{query.shape[1]} keys",
            got=str(key.shape[1]),
            remedy="block_sparse_attention takes any mask",
        )
    runner = resolve(backend)
    reasons = chosen.not_supported(call)
    if reasons:
        warnings.warn(f"{chosen.name} runs dense here: {', '.join(reasons)}", stacklevel=2)
        return runner.dense(call)
    return chosen.attend(call, runner)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    *,
    backend: str = "auto",
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return [B, S, H, D] over the kept pairs of a mask, and the log-sum-exp [B, S, H] if asked.

    Args:
        query: [B, S, H, D].
        key: [B, S_k, H, D]; S_k may differ from S.
        value: as key.
        mask: blocks to compute.
        backend: a named one never falls back.
        scale: factor on the scores; None means D ** -0.5.
        key_mask: bool [B, S_k], False drops a key.
        key_bias: float [B or 1, H or 1, S_k] added to the scaled scores.
        return_lse: also return the log-sum-exp.
    Raises:
        UnsupportedCall: the mask or the tensors do not fit, with expected and got.
    """
    grid = TokenGrid(1, 1, int(query.shape[1]))
    call = AttentionCall(query, key, value, grid, scale=scale, key_mask=key_mask, key_bias=key_bias)
    chosen = choose(backend, call, mask)
    if return_lse:
        return chosen.block_sparse(call, mask, return_lse=True)
    return chosen.block_sparse(call, mask)
