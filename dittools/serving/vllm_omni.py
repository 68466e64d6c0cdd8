"""The `SPARSE_ATTN` slot of vLLM-Omni: one function that runs a method inside its transformers.

Source: the plugin contract of vllm-project/vllm-omni pull request 4493 (entry-point group
`vllm_omni.sparse_attn`, read at commit ef4a8b58 and in its later revision that publishes
`latent_shape` and `patch_size`). The request was open when this was written: neither 0.30.0 nor
0.32.0rc1 has the slot. Nothing of vLLM-Omni is imported.

The contract names neither the layer nor the request, so a method starts afresh with every call:
what others keep from step to step is worked out each time, and methods that change from layer to
layer are refused.
"""

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.errors import InputError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.kernels.auto import resolve
from dittools.methods import Method, build
from dittools.methods.presets import DEFAULT_DENSE_STEPS

logger = logging.getLogger("dittools")
_LAYERED = {"vmoba": "its blocks change from layer to layer", "tome": "it draws per layer"}
_TOLD: set[str] = set()
_MOST_TOLD = 64  # reasons; what is logged once must not grow with the requests


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> torch.Tensor:
    """Return [B, S, H, D]: self-attention as a method approximates it.

    A call the method does not fit (cross-attention, an unknown grid, a mask over pairs, a dense
    step) runs dense; each reason is logged once.

    Args:
        query: [B, S, H, D].
        key: [B, S_k, H_k, D]; H_k divides H.
        value: as key.
        params: of the configuration, `method` (a name, "radial" when absent), `method_params` (its
            parameters), `dense_steps` (leading steps that stay dense, a count or a share of the
            run), `text` ("before" or "after": where tokens beside the grid stand) and `kernel` (a
            dittools backend); of the engine, `latent_shape`, `patch_size`, `denoise_step_idx`,
            `total_denoise_steps` and `attn_mask`. Others are not read.
        is_causal: causal calls run dense.
        softmax_scale: factor on the scores.
    Raises:
        UnknownMethod: no such method, or it does not take one of the parameters.
        UnsupportedCall: the method needs to know the layer, or the named kernel cannot run.
        InputError: a configured value is unusable.
    """
    method = _method(params)
    if key.shape[2] != query.shape[2]:
        repeat = query.shape[2] // key.shape[2]
        key, value = (t.repeat_interleave(repeat, dim=2) for t in (key, value))
    mask = params.get("attn_mask")
    key_mask, reason = _key_mask(mask, query, key)
    grid = _grid(params, int(query.shape[1]))
    if is_causal:
        reason = "causal attention"
    elif isinstance(grid, str):
        reason = grid
    elif key.shape[1] != query.shape[1]:
        reason = "cross-attention"
    if not reason and isinstance(grid, TokenGrid):
        step, steps = _moment(params)
        call = AttentionCall(
            query, key, value, grid, step=step, steps=steps, scale=softmax_scale, key_mask=key_mask
        )
        if _is_dense_step(params, step, steps):
            return _backend(params).dense(call)
        reason = "; ".join(method.not_supported(call))
        if not reason:
            return method.attend(call, _backend(params))
    _tell(f"{method.name} runs dense: {reason}")
    return _dense(query, key, value, mask, is_causal, softmax_scale)


attend = torch.compiler.disable(_attend, recursive=True)  # reads sizes and steps from tensors
attend.capabilities = {"supports_attention_mask": True}


def _method(params: Mapping[str, Any]) -> Method:
    name, own = params.get("method", "radial"), params.get("method_params") or {}
    if not isinstance(name, str) or not isinstance(own, Mapping):
        raise InputError(
            "the configuration of the dittools plugin is malformed",
            expected="method: a name, method_params: a mapping",
            got=f"{name!r}, {own!r}",
        )
    if name in _LAYERED or (name == "paro" and own.get("tables")):
        reason = _LAYERED.get(name, "its tables differ from layer to layer")
        raise UnsupportedCall(
            f"{name} cannot run in vLLM-Omni's SPARSE_ATTN slot, which names no layer",
            got=reason,
            remedy="another method, or dittools.attach on a diffusers pipeline",
        )
    return _built(name, json.dumps(dict(own), sort_keys=True))


@lru_cache(maxsize=32)
def _built(name: str, params: str) -> Method:
    return build(name, json.loads(params))


def _backend(params: Mapping[str, Any]) -> Backend:
    return resolve(str(params.get("kernel", "auto")))


def _triple(value: Any) -> tuple[int, int, int] | str:
    """Return the three numbers all samples share, or why there are none."""
    rows = value.tolist() if isinstance(value, torch.Tensor) else list(value)
    if rows and not isinstance(rows[0], (list, tuple)):
        rows = [rows]
    distinct = {tuple(int(n) for n in row) for row in rows}
    if len(distinct) != 1:
        return "the samples of the batch differ in size"
    first = distinct.pop()
    if len(first) != 3 or min(first) < 1:
        return f"the engine gave no size of three axes: {first}"
    return first


def _grid(params: Mapping[str, Any], tokens: int) -> TokenGrid | str:
    """Return the token grid, or why it is not known."""
    latent, patch = params.get("latent_shape"), params.get("patch_size")
    if latent is None or patch is None:
        return "the engine gave no latent_shape and patch_size"
    shape, sides = _triple(latent), _triple(patch)
    if isinstance(shape, str) or isinstance(sides, str):
        return shape if isinstance(shape, str) else str(sides)
    frames, height, width = (length // side for length, side in zip(shape, sides, strict=True))
    text = tokens - frames * height * width
    where = params.get("text")
    if where not in (None, "before", "after"):
        raise InputError("text is misplaced", expected='"before" or "after"', got=repr(where))
    if min(frames, height, width) < 1 or text < 0 or (text and where is None):
        return f"{tokens} tokens are not the {frames} x {height} x {width} of the latents"
    before = text if where == "before" else 0
    return TokenGrid(frames, height, width, text_before=before, text_after=text - before)


def _moment(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return the earliest step of the batch, from 0, and the longest run; 0, 0 when not told."""
    step, steps = params.get("denoise_step_idx"), params.get("total_denoise_steps")
    if step is None:
        return 0, 0
    return int(torch.as_tensor(step).min()), 0 if steps is None else int(
        torch.as_tensor(steps).max()
    )


def _is_dense_step(params: Mapping[str, Any], step: int, steps: int) -> bool:
    """Whether a step stays dense; without step numbers nothing does, and that is said once."""
    amount = params.get("dense_steps", DEFAULT_DENSE_STEPS)
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0:
        raise InputError(
            "dense_steps is unusable", expected="a count, or a share below 1", got=repr(amount)
        )
    if params.get("denoise_step_idx") is None or (isinstance(amount, float) and not steps):
        if amount:
            _tell("every step runs sparse: the engine gave no step numbers")
        return False
    first = amount if isinstance(amount, int) else round(amount * steps)
    return step < first


def _key_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor | None, str]:
    """Return bool [B, S_k] where a mask is one over keys, else the reason to run dense."""
    if mask is None:
        return None, ""
    if mask.dtype != torch.bool:
        return None, "an additive attention mask"
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[1] != key.shape[1]:
        return None, "an attention mask over pairs"
    return mask.expand(query.shape[0], -1), ""


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale
    ).transpose(1, 2)


def _tell(sentence: str) -> None:
    if sentence not in _TOLD and len(_TOLD) < _MOST_TOLD:
        _TOLD.add(sentence)
        logger.warning("vLLM-Omni: %s", sentence)
