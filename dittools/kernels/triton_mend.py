"""Second pass of the Triton kernel: bad keys and values reach only the queries that keep them.

A weight of exactly 0 does not shut a value out: 0 * NaN is NaN. The first pass has no test for
that, so after it a NaN or inf of a dropped key stands in rows that share a tile with a row that
keeps it. Here every query tile whose output is finite is left as it is, after one read of it; the
others are computed again with such values taken out of the product and given back to the rows that
keep them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from typing import Any

import triton
import triton.language as tl

from dittools.kernels.triton_config import Config
from dittools.kernels.triton_tiles import LN2, LOG2E, LOWEST, kept_bits, place_of, start_of


@triton.jit(do_not_specialize=["tasks", "q_blocks", "list_stride", "q_slots", "k_slots"])
def mend_kernel(
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
    GATHER: tl.constexpr, BIAS: tl.constexpr, TILES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the rows of one query tile again if one of them is not finite.

    The arguments are those of `attend_kernel`; the scales of 8-bit operands are not read.
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
    wide = head.to(tl.int64)
    index_base = index_ptr + head * stride_ih

    inside = (unit % cuts) * TILE_M + tl.arange(0, TILE_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, TILE_N)
    in_head = (offs_d < HEAD_DIM)[None, :]
    token = place_of(block * Q_BLOCK, index_base, inside, q_slots, GATHER, True)
    real = (token >= 0)[:, None] & in_head
    place = token.to(tl.int64)
    out_at = out_ptr + batch * stride_ob + wide * stride_oh
    out_at = out_at + place[:, None] * stride_os + offs_d[None, :]
    before = tl.load(out_at, mask=real, other=0.0).to(tl.float32)
    spoilt = tl.max(tl.max(tl.where(tl.abs(before) < float("inf"), 0, 1), 1), 0)
    first = tl.load(indptr_ptr + row) * parts
    last = tl.load(indptr_ptr + row + 1) * parts
    last = tl.where(spoilt > 0, last, first)
    token = tl.where(spoilt > 0, token, -1)
    real = (token >= 0)[:, None] & in_head

    q_at = q_ptr + batch * stride_qb + wide * stride_qh
    q_at = q_at + place[:, None] * stride_qs + offs_d[None, :] * stride_qd
    q = tl.load(q_at, mask=real, other=0.0)
    k_base = k_ptr + batch * stride_kb + wide * stride_kh
    v_base = v_ptr + batch * stride_vb + wide * stride_vh
    bias_base = bias_ptr + batch * stride_bb + wide * stride_bh
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    bad = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([TILE_M], dtype=tl.float32)
    row_max = tl.full([TILE_M], LOWEST, dtype=tl.float32)
    for entry in range(first, last):
        start = start_of(entry, last, block_ptr, KV_BLOCK, TILE_N)
        key_token = place_of(start, index_base, offs_n, k_slots, GATHER, True)
        there = (key_token >= 0)[:, None] & in_head
        at = key_token.to(tl.int64)[:, None]
        k_at = k_base + at * stride_ks + offs_d[None, :] * stride_kd
        v_at = v_base + at * stride_vs + offs_d[None, :] * stride_vd
        k = tl.load(k_at, mask=there, other=0.0)
        v = tl.load(v_at, mask=there, other=0.0)
        clean = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0).to(v.dtype)
        kept = (key_token >= 0)[None, :]
        if UPCAST:
            score = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision=PRECISION)
        else:
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = score * scale
        if BIAS:
            bias = tl.load(bias_base + key_token, mask=key_token >= 0, other=0.0)
            score = score + (bias * LOG2E)[None, :]
            kept = kept & (bias != float("-inf"))[None, :]
        if TILES:
            tile = tl.load(tile_ptr + entry // parts)
            words: tl.constexpr = (KV_BLOCK + 31) // 32
            column = (entry % parts) * TILE_N
            kept = kept & kept_bits(word_ptr, tile, inside, column, words, TILE_N, Q_BLOCK)
        score = tl.where(kept, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        p = tl.math.exp2(score - new_max[:, None])
        shrink = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        acc = acc * shrink[:, None]
        if UPCAST:
            low = p.to(v.dtype).to(tl.float32)
            acc = tl.dot(low, clean.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(p.to(v.dtype), clean, acc, input_precision=PRECISION)
        # counts of the bad values each row keeps, exact in fp16 with sums in fp32
        seen = tl.where(kept & (inside >= 0)[:, None], 1.0, 0.0).to(tl.float16)
        raw = v.to(tl.float32)
        above = tl.dot(seen, (raw == float("inf")).to(tl.float16))
        below = tl.dot(seen, (raw == float("-inf")).to(tl.float16))
        lost = tl.dot(seen, (raw != raw).to(tl.float16))
        bad += tl.where(above > 0, float("inf"), 0.0) + tl.where(below > 0, float("-inf"), 0.0)
        bad += tl.where(lost > 0, float("nan"), 0.0)

    empty = row_sum == 0
    total = tl.where(empty, 1.0, row_sum)
    out = tl.where(empty[:, None], 0.0, acc / total[:, None] + bad)
    lse = tl.where(empty, float("-inf"), (row_max + tl.math.log2(total)) * LN2)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=real)
    lse_at = lse_ptr + batch * (stride_ob // HEAD_DIM) + place * HEADS + head
    tl.store(lse_at, lse, mask=token >= 0)


def mend_options(fixed: dict[str, Any], itemsize: int) -> tuple[dict[str, Any], Config]:
    """Return the compile-time arguments of `mend_kernel` and how to launch it.

    Args:
        fixed: the compile-time arguments of `attend_kernel`.
        itemsize: bytes per element.
    """
    edge = 32 if fixed["BLOCK_D"] * itemsize <= 512 else 16  # larger ones spill
    tile_m = min(edge, fixed["Q_BLOCK"] & -fixed["Q_BLOCK"])
    tile_n = min(32 if itemsize == 2 else 16, fixed["KV_BLOCK"] & -fixed["KV_BLOCK"])
    left_out = ("SCATTER", "MASKED", "QUANT", "P_RANGE")
    own = {name: value for name, value in fixed.items() if name not in left_out}
    return own | {"TILE_M": tile_m, "TILE_N": tile_n}, Config(tile_m, tile_n, 8, 1)
