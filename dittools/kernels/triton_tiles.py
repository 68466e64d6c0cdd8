"""What the Triton kernels share: where a tile's tokens stand, and which of its pairs are kept."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton at decoration
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # finite start of the row maximum: rows without keys make no NaN


@triton.jit
def place_of(start, index_base, offs_n, k_slots, GATHER: tl.constexpr, MASKED: tl.constexpr):
    """Token of each slot of the tile at `start`, -1 where there is none."""
    slot = start + offs_n
    if GATHER and MASKED:
        token = tl.load(index_base + slot, mask=slot < k_slots, other=-1)
    elif GATHER:
        token = tl.load(index_base + slot)
    elif MASKED:
        token = tl.where(slot < k_slots, slot, -1)
    else:
        token = slot
    return token


@triton.jit
def start_of(entry, last, block_ptr, KV_BLOCK: tl.constexpr, TILE_N: tl.constexpr):
    """First slot of the tile `entry`; 0 past the end of the row."""
    parts: tl.constexpr = KV_BLOCK // TILE_N
    block = tl.load(block_ptr + entry // parts, mask=entry < last, other=0)
    return block * KV_BLOCK + (entry % parts) * TILE_N


@triton.jit
def kept_bits(word_ptr, tile, row, column, q_words, TILE_N: tl.constexpr, Q_BLOCK: tl.constexpr):
    """Bool [TILE_M, TILE_N] of a bit tile, loaded as one word per row and 32 keys.

    column is the tile's first key inside its block.
    """
    offs_n = tl.arange(0, TILE_N)
    base = word_ptr + (tile.to(tl.int64) * Q_BLOCK + row) * q_words + column // 32
    shift = offs_n & 31
    if TILE_N < 32:
        shift = column % 32 + offs_n
    bits = (tl.load(base)[:, None] >> shift[None, :]) & 1
    for part in tl.static_range(1, TILE_N // 32):
        word = tl.load(base + part)
        later = (word[:, None] >> shift[None, :]) & 1
        bits = tl.where((offs_n // 32 == part)[None, :], later, bits)
    return bits != 0
