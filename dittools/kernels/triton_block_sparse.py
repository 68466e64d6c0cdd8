"""Block-sparse attention forward in Triton: one program instance per (batch, head, query tile).

A tile walks the list of its row, first the entries that need no test, then those with bit tiles,
padding slots or a ragged tail. Tokens are gathered and scattered through the slot index, so no
reordered copy is made. The place of the next tile is carried across iterations: a list load inside
the loop would halve the depth of the key/value pipeline.

Source: arXiv:2205.14135 and arXiv:2307.08691 (online softmax); list-driven form as in block-sparse
FlashAttention. Runs on Triton 3.6 to 3.9; block pointers are avoided since 3.9 removed them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from typing import Any

import torch
import triton
import triton.language as tl

from dittools.kernels.program import Program
from dittools.kernels.triton_config import (
    Config,
    capability_of,
    default_config,
    padded_head_dim,
)
from dittools.kernels.triton_mend import mend_kernel, mend_options
from dittools.kernels.triton_tiles import (
    INTERPRETED,
    LN2,
    LOG2E,
    LOWEST,
    kept_bits,
    place_of,
    start_of,
)


@triton.jit
def _walk(
    acc, row_sum, row_max, q, first, last, inside_row,
    k_base, v_base, bias_base, index_base, block_ptr, tile_ptr, word_ptr, k_scale_base,
    stride_ks, stride_kd, stride_vs, stride_vd, k_slots, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    TILE_N: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    QUANT: tl.constexpr, P_RANGE: tl.constexpr,
):  # fmt: skip
    """Fold entries first..last into the running softmax. MASKED: test every pair."""
    parts: tl.constexpr = KV_BLOCK // TILE_N
    offs_n = tl.arange(0, TILE_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = (offs_d < HEAD_DIM)[None, :]
    start = start_of(first, last, block_ptr, KV_BLOCK, TILE_N)
    token = place_of(start, index_base, offs_n, k_slots, GATHER, MASKED)
    for entry in tl.range(first, last):
        place = token.to(tl.int64)[:, None]
        k_at = k_base + place * stride_ks + offs_d[None, :] * stride_kd
        v_at = v_base + place * stride_vs + offs_d[None, :] * stride_vd
        if MASKED:
            real = (token >= 0)[:, None] & in_head
            k = tl.load(k_at, mask=real, other=0.0)
            v = tl.load(v_at, mask=real, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(k_at, mask=in_head, other=0.0)
            v = tl.load(v_at, mask=in_head, other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        factor = scale
        if QUANT:
            score = tl.dot(q, tl.trans(k)).to(tl.float32)
            factor = scale * tl.load(k_scale_base + start // KV_BLOCK)
        elif UPCAST:
            score = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision=PRECISION)
        else:
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if BIAS:
            bias = tl.load(bias_base + token, mask=token >= 0, other=0.0)
            score = score * factor + (bias * LOG2E)[None, :]
        if MASKED:
            kept = (token >= 0)[None, :]
            if TILES:
                tile = tl.load(tile_ptr + entry // parts)
                words: tl.constexpr = (KV_BLOCK + 31) // 32
                column = (entry % parts) * TILE_N
                kept = kept & kept_bits(word_ptr, tile, inside_row, column, words, TILE_N, Q_BLOCK)
            score = tl.where(kept, score, float("-inf"))
        if BIAS:
            new_max = tl.maximum(row_max, tl.max(score, 1))
            p = tl.math.exp2(score - new_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(score, 1) * factor)
            p = tl.math.exp2(score * factor - new_max[:, None])
        shrink = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        row_max = new_max
        start = start_of(entry + 1, last, block_ptr, KV_BLOCK, TILE_N)
        token = place_of(start, index_base, offs_n, k_slots, GATHER, MASKED)
        if P_RANGE == 127:
            rounded = (p * 127 + 0.5).to(tl.int8)
            acc += tl.dot(rounded, v).to(tl.float32)
        elif P_RANGE == 448:
            low = (p * 448).to(v.dtype)
            acc = (
                tl.dot(low.to(tl.float32), v.to(tl.float32), acc) if UPCAST else tl.dot(low, v, acc)
            )
        elif UPCAST:
            low = p.to(v.dtype).to(tl.float32)
            acc = tl.dot(low, v.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["tasks", "q_blocks", "list_stride", "q_slots", "k_slots"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, index_ptr,
    task_ptr, indptr_ptr, masked_from_ptr, block_ptr, tile_ptr, word_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh,
    stride_bb, stride_bh, stride_ih,
    tasks, q_blocks, list_stride, q_slots, k_slots, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    QUANT: tl.constexpr, P_RANGE: tl.constexpr,
):  # fmt: skip
    """Write [B, S, H, D] and the log-sum-exp [B, S, H] of one query tile.

    GATHER reads query, key, value through the slot index, SCATTER writes the output through it.
    MASKED is off when no entry of the whole program needs a test.
    """
    cuts: tl.constexpr = Q_BLOCK // TILE_M
    parts: tl.constexpr = KV_BLOCK // TILE_N
    unit = tl.program_id(0)
    batch = (unit // (tasks * cuts)).to(tl.int64)
    unit = unit % (tasks * cuts)
    task = tl.load(task_ptr + unit // cuts)
    head = task // q_blocks
    block = task % q_blocks
    row = head * list_stride + block
    first = tl.load(indptr_ptr + row) * parts
    middle = tl.load(masked_from_ptr + row) * parts
    last = tl.load(indptr_ptr + row + 1) * parts
    wide = head.to(tl.int64)
    index_base = index_ptr + head * stride_ih

    inside = (unit % cuts) * TILE_M + tl.arange(0, TILE_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = (offs_d < HEAD_DIM)[None, :]
    source = place_of(block * Q_BLOCK, index_base, inside, q_slots, GATHER, True)
    q_at = q_ptr + batch * stride_qb + wide * stride_qh
    q_at = q_at + source.to(tl.int64)[:, None] * stride_qs + offs_d[None, :] * stride_qd
    q = tl.load(q_at, mask=(source >= 0)[:, None] & in_head, other=0.0)

    factor = scale
    k_scale_base = k_scale_ptr
    if QUANT:
        kv_blocks = tl.cdiv(k_slots, KV_BLOCK)
        factor = scale * tl.load(q_scale_ptr + (batch * HEADS + head) * q_blocks + block)
        k_scale_base = k_scale_ptr + (batch * HEADS + head) * kv_blocks
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([TILE_M], dtype=tl.float32)
    row_max = tl.full([TILE_M], LOWEST, dtype=tl.float32)
    k_base = k_ptr + batch * stride_kb + wide * stride_kh
    v_base = v_ptr + batch * stride_vb + wide * stride_vh
    bias_base = bias_ptr + batch * stride_bb + wide * stride_bh
    acc, row_sum, row_max = _walk(
        acc, row_sum, row_max, q, first, middle, inside,
        k_base, v_base, bias_base, index_base, block_ptr, tile_ptr, word_ptr, k_scale_base,
        stride_ks, stride_kd, stride_vs, stride_vd, k_slots, factor,
        HEAD_DIM, BLOCK_D, Q_BLOCK, KV_BLOCK, TILE_N, GATHER, BIAS, TILES, False, UPCAST,
        PRECISION, QUANT, P_RANGE,
    )  # fmt: skip
    if MASKED:
        acc, row_sum, row_max = _walk(
            acc, row_sum, row_max, q, middle, last, inside,
            k_base, v_base, bias_base, index_base, block_ptr, tile_ptr, word_ptr, k_scale_base,
            stride_ks, stride_kd, stride_vs, stride_vd, k_slots, factor,
            HEAD_DIM, BLOCK_D, Q_BLOCK, KV_BLOCK, TILE_N, GATHER, BIAS, TILES, True, UPCAST,
            PRECISION, QUANT, P_RANGE,
        )  # fmt: skip

    empty = row_sum == 0
    total = tl.where(empty, 1.0, row_sum)
    out = tl.where(empty[:, None], 0.0, acc / total[:, None])
    if P_RANGE > 0:
        v_scale_at = v_scale_ptr + (batch * HEADS + head) * HEAD_DIM + offs_d
        v_scale = tl.load(v_scale_at, mask=offs_d < HEAD_DIM, other=0.0)
        out = out * (v_scale / P_RANGE)[None, :]
    lse = tl.where(empty, float("-inf"), (row_max + tl.math.log2(total)) * LN2)
    # looked up again: kept since the start, it would hold registers through the loops
    token = place_of(block * Q_BLOCK, index_base, inside, q_slots, SCATTER, True)
    real = token >= 0
    place = token.to(tl.int64)
    out_at = out_ptr + batch * stride_ob + wide * stride_oh
    out_at = out_at + place[:, None] * stride_os + offs_d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & in_head)
    # the log-sum-exp is laid out as the output without its last axis
    lse_at = lse_ptr + batch * (stride_ob // HEAD_DIM) + place * HEADS + head
    tl.store(lse_at, lse, mask=real)


def constants(
    made: Program, query: torch.Tensor, config: Config, *, bias: bool, slots: bool = False
) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel; slots: inputs are in slot order already."""
    heads, head_dim = query.shape[2:]
    full = query.dtype == torch.float32
    # `allow_tf32` raises once a program has set this newer name of it
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "Q_BLOCK": made.q_block,
        "KV_BLOCK": made.kv_block,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "GATHER": made.token_at is not None and not slots,
        "SCATTER": made.token_at is not None,
        "BIAS": bias,
        "TILES": made.words is not None,
        "MASKED": made.masked,
        # the interpreter multiplies the bit patterns of bf16 (triton-lang/triton#11584)
        "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
        "PRECISION": precision if full else None,
        "QUANT": False,
        "P_RANGE": 0,
    }


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: Program,
    bias: torch.Tensor | None,
    scale: float,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, S, H, D] and the log-sum-exp float32 [B, S, H].

    Args:
        query, key, value: [B, S, H, D] and [B, S_k, H, D], strided views without a copy.
        made: the program, on the same device.
        bias: float [B or 1, H or 1, S_k] added to the scaled scores; -inf drops a key.
        scale: positive factor on the scores.
        config: launch configuration; None takes the default of the shape.
    """
    batch, length, heads, head_dim = query.shape
    if config is None:
        config = default_config(
            head_dim, made.q_block, made.kv_block, query.dtype,
            masked=made.masked, capability=capability_of(query.device),
        )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, length, heads), dtype=torch.float32, device=query.device)
    fixed = constants(made, query, config, bias=bias is not None)
    run_kernel(query, key, value, out, lse, made, bias, scale, config, fixed)
    if made.words is not None or bias is not None:  # else every row keeps what its tiles hold
        own, small = mend_options(fixed, query.element_size())
        run_kernel(
            query, key, value, out, lse, made, bias, scale, small, own, kernel=mend_kernel
        )  # fmt: skip
    return out, lse


def run_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    made: Program,
    bias: torch.Tensor | None,
    scale: float,
    config: Config,
    fixed: dict[str, Any],
    scales: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None,) * 3,
    kernel: Any = attend_kernel,
) -> None:
    """Launch a kernel once; `fixed` are its compile-time arguments, `scales` of q, k, v."""
    tasks = made.task.numel()
    if not tasks or not out.numel():
        return
    q_blocks = -(-made.q_slots // made.q_block)
    shared_lists = made.indptr.numel() - 1 == q_blocks
    line = (0, 0)
    if bias is not None:
        bias = bias.float()
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        line = (bias.stride(0) * (bias.shape[0] > 1), bias.stride(1) * (bias.shape[1] > 1))
    index_stride = 0
    if made.token_at is not None and made.token_at.shape[0] > 1:
        index_stride = made.token_at.stride(0)
    absent = made.task  # stands in for pointers the compile-time arguments leave unread
    present = [absent if t is None else t for t in (bias, made.token_at, made.words, *scales)]
    options: dict[str, Any] = {"maxnreg": config.maxnreg} if config.maxnreg else {}
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever it is given
        kernel[(out.shape[0] * tasks * (made.q_block // config.tile_m),)](
            query, key, value, out, lse, *present[:2],
            made.task, made.indptr, made.masked_from, made.block, made.tile, *present[2:],
            *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3],
            *line, index_stride,
            tasks, q_blocks, 0 if shared_lists else q_blocks, made.q_slots, made.k_slots,
            scale * LOG2E.value,
            **fixed,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            **options,
        )  # fmt: skip
