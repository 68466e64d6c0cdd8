"""Attention over keys at four resolutions: as they are, and pooled by 2, 4 and 8.

A pooled key gets the bias ln(tokens it stands for), which makes it weigh as that many tokens.
Pooled keys are extra keys of the call, so that one ordinary launch runs all levels.
Source: arXiv:2512.04025.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask, pack_bits
from dittools.methods.base import attend_exactly
from dittools.methods.placing import placed
from dittools.order import TokenOrder

FACTORS = (1, 2, 4, 8)
_CACHED = 2**17  # elements pooled at a time on a CPU


def attend_levels(
    call: AttentionCall,
    backend: Backend,
    levels: torch.Tensor,
    order: TokenOrder,
    block_size: int,
    count_bias: bool = True,
    key_block: int = 0,
) -> torch.Tensor:
    """Return [1, S, H, D]: attention over key blocks at the resolution each query block asks for.

    Args:
        call: batch 1.
        backend: runs the one launch.
        levels: int [H, query blocks, key blocks] over the grid's tokens; 1, 2, 4, 8 or 0.
        order: the padded order blocks are cut from.
        block_size: tokens per query block.
        count_bias: whether pooled keys get the log of the tokens they stand for.
        key_block: tokens per key block, a divisor of block_size; 0 takes block_size.
    """
    size = key_block or block_size
    slots = levels.shape[2] * size
    keys, values, bias = _pyramid(call, order, slots, 8 * _launch_block(size), count_bias)
    extended = replace(call, key=keys, value=values, key_mask=None, key_bias=bias)
    mask = level_mask(levels, call.grid, order, (block_size, size), int(keys.shape[1]))
    out = attend_exactly(extended, backend, mask)
    return backend.dense(call) if out is None else out


def _launch_block(key_block: int) -> int:
    """Return the keys per block of the launch: an eighth of a key block, or 16 if that is less.

    Kernels want 16 or more; pooled key blocks that share one are told apart by bit tiles.
    """
    return 16 if key_block in (16, 32, 64) else key_block // 8


def _pyramid(
    call: AttentionCall, order: TokenOrder, slots: int, multiple: int, count_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys, values and their bias: the sequence's own, then pooled by 2, 4 and 8.

    Args:
        call: batch 1.
        order: the order that is pooled.
        slots: leading slots that are pooled.
        multiple: of 8, that the slots are padded to: no token stands there, their bias is -inf.
        count_bias: whether pooled keys get the log of the tokens they stand for.
    """
    own, padding = call.key.shape[1], -slots % multiple
    pooled = slots + padding
    made = [x.new_empty((1, own + pooled // 8 * 7, *x.shape[2:])) for x in (call.key, call.value)]
    made[0][:, :own], made[1][:, :own] = call.key, call.value
    index = torch.nn.functional.pad(order.index[0, :slots], (0, padding), value=-1)
    counts = [(index >= 0).float()]
    biases = [_own_bias(call)]
    for _ in FACTORS[1:]:
        counts.append(counts[-1].unflatten(0, (-1, 2)).sum(1))
        bias = counts[-1].log()
        if not count_bias:
            bias = torch.where(counts[-1] > 0, 0.0, float("-inf"))
        biases.append(bias[None, None].expand(1, biases[0].shape[1], -1))
    for source, target in zip((call.key, call.value), made, strict=True):
        _pool(source[0], index, counts, target[0, own:])
    return made[0], made[1], torch.cat(biases, dim=2)


def _pool(
    source: torch.Tensor, index: torch.Tensor, counts: list[torch.Tensor], target: torch.Tensor
) -> None:
    """Write means of 2, 4 and 8 slots, level after level, a few slots at a time.

    Args:
        source: [S, H, D].
        index: int64 [slots], the token in each slot, -1 for none; slots are a multiple of 8.
        counts: tokens in each slot, then in each group of 2, 4 and 8.
        target: [slots / 8 * 7, H, D].
    """
    slots, wide = len(index), torch.promote_types(source.dtype, torch.float32)
    each = slots
    if source.device.type == "cpu":
        each = max(8, _CACHED // source[0].numel() // 8 * 8)
    for first in range(0, slots, each):
        part = index[first : first + each]
        sums = source.index_select(0, part.clamp(min=0)).to(wide)
        hole = part < 0
        if source.device.type != "cpu":  # whether there is one would have to be read back
            sums.masked_fill_(hole[:, None, None], 0)
        elif bool(hole.any()):
            sums[hole] = 0
        level = 0
        for factor, count in zip(FACTORS[1:], counts[1:], strict=True):  # from the one before
            sums = sums[0::2] + sums[1::2]
            start = first // factor
            share = 1 / count[start : start + len(sums)].clamp(min=1)
            target[level + start : level + start + len(sums)] = sums * share[:, None, None]
            level += slots // factor


def _own_bias(call: AttentionCall) -> torch.Tensor:
    bias = call.additive_mask()
    if bias is None:
        return torch.zeros((1, 1, call.key.shape[1]), device=call.query.device)
    return bias


def level_mask(
    levels: torch.Tensor,
    grid: TokenGrid,
    order: TokenOrder,
    block_size: tuple[int, int],
    kv_tokens: int,
) -> BlockMask:
    """Return the mask over query blocks and launch blocks of keys, level after level.

    It counts a pooled key as one and leaves out those that stand for no token.
    """
    (heads, blocks, columns), (size, keys) = levels.shape, block_size
    width = _launch_block(keys)
    shared = keys < 8 * width  # some levels pool below a launch block
    q_blocks, pooled = order.slots // size, columns * keys + -columns * keys % (8 * width)
    real = order.index[0] >= 0
    stands = real[: columns * keys].float()
    parts, cuts, first = [], [], 0
    seen = torch.full((heads, blocks), float(grid.text), device=levels.device)
    for factor in FACTORS:
        kept, each = levels == factor, keys // factor
        filled = stands.view(columns, each, factor).amax(2).sum(1)
        seen += kept.float() @ filled
        shown = order.slots if factor == 1 else pooled // factor
        part = kept.new_zeros((heads, q_blocks, shown // width))
        if shared:
            cuts.append(torch.full_like(part, -1, dtype=torch.int32))
        if each < width:
            kept, codes = _sharing(kept, width // each, first)
            cuts[-1][:, :blocks, : kept.shape[2]] = codes
            first += 2 ** (width // each)
        elif each > width:
            kept = kept.repeat_interleave(each // width, dim=2)
        part[:, :blocks, : kept.shape[2]] = kept
        if factor == 1:
            part[:, blocks:] = True  # text queries
            part[:, :, blocks * size // width :] = True  # text keys
        parts.append(part)
    rows = real.view(q_blocks, size).sum(1)[:blocks]
    return BlockMask(
        torch.cat(parts, dim=2),
        (size, width),
        tile_index=torch.cat(cuts, dim=2) if shared else None,
        tiles=placed(_shared_tiles(size, keys), levels.device) if shared else None,
        order=order,
        q_tokens=grid.total,
        kv_tokens=kv_tokens,
        pairs=(seen.double() * rows).sum(1) + grid.text * grid.total,
    )


def _sharing(kept: torch.Tensor, several: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which launch blocks hold a kept one of `several` key blocks each, and their bit tiles.

    Args:
        kept: bool [H, query blocks, key blocks].
        several: key blocks per launch block.
        first: the first bit tile of the level.
    """
    groups = torch.nn.functional.pad(kept, (0, -kept.shape[2] % several)).unflatten(
        2, (-1, several)
    )
    bit = 2 ** torch.arange(several, dtype=torch.int32, device=kept.device)
    code = (groups * bit).sum(-1, dtype=torch.int32)
    partly = (code > 0) & (code < 2**several - 1)
    return code > 0, torch.where(partly, code + first, -1)


@lru_cache(maxsize=16)
def _shared_tiles(q_block: int, key_block: int) -> torch.Tensor:
    """Return uint8 [n, q_block, bytes]: a bit tile per set of kept key blocks, level by level."""
    width = _launch_block(key_block)
    tiles = []
    for several in (width * factor // key_block for factor in FACTORS):
        if several > 1:
            code, place = torch.arange(2**several)[:, None], torch.arange(width)
            tiles.append(code >> (place // (width // several)) & 1 > 0)
    return pack_bits(torch.cat(tiles)[:, None].expand(-1, q_block, -1))


def level_density(levels: torch.Tensor) -> float:
    """Return the cost next to full attention: mean of 1 / factor, 0 where a block is skipped."""
    share = torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0)
    return float(share.double().mean())
