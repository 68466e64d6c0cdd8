"""The attention program as tensors a GPU kernel walks, and the registered op that runs it.

A `Program` is a `BlockMask` made ready for one pair of lengths on one device: entries that need a
token-level test (bit tiles, the ragged tail, padding slots) come last in their row, bit tiles are
32-bit words, and the rows are listed in the order they should start.
"""

import os
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.order import TokenOrder

WORD = 32  # keys per word of a bit tile
LONG_SHARE = 0.75  # of a head's work that runs head by head; the rest is kept to level the end


class Program(NamedTuple):
    """What `torch.ops.dittools.block_sparse` needs besides query, key, value and bias.

    Attributes:
        task: int32 [H * q_blocks], head * q_blocks + q_block in launch order, long rows first.
        indptr: int32 [rows + 1]; rows = heads of the lists (H or 1) * q_blocks.
        masked_from: int32 [rows]; entries indptr[r]:masked_from[r] need no test, the others do.
        block: int32 [entries], key block of each entry.
        tile: int32 [entries], row of words.
        words: int32 [n, q_block, ceil(kv_block / 32)] or None without bit tiles; bit j of word i
            is key 32 i + j.
        token_at: int32 [H or 1, key slots], token of each slot, -1 for padding; None: as it stands.
        q_block, kv_block: tokens per block.
        q_slots, k_slots: slots that are walked, the extra keys included.
        masked: whether an entry may need a test.
        computed: share of the blocks that are computed.
    """

    task: torch.Tensor
    indptr: torch.Tensor
    masked_from: torch.Tensor
    block: torch.Tensor
    tile: torch.Tensor
    words: torch.Tensor | None
    token_at: torch.Tensor | None
    q_block: int
    kv_block: int
    q_slots: int
    k_slots: int
    masked: bool
    computed: float

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, H, D] and the log-sum-exp float32 [B, S, H]; one node for torch.compile."""
        factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
        args = (query, key, value, *self[:7], bias, factor, *self[7:12])
        out, lse = torch.ops.dittools.block_sparse(*args)
        return out, lse

    def check(self, q_len: int, k_len: int) -> None:
        """Raise when a list points outside; costs device syncs, so only debug mode asks for it.

        Raises:
            UnsupportedCall: with the list and the range it left.
        """
        slots = self.k_slots if self.token_at is None else int(self.token_at.shape[1])
        ranges = [
            ("indptr", self.indptr, 0, len(self.block)),
            ("masked_from", self.masked_from, 0, len(self.block)),
            ("block", self.block, 0, -(-self.k_slots // self.kv_block) - 1),
            ("tile", self.tile, 0, max(0, 0 if self.words is None else len(self.words) - 1)),
            ("task", self.task, 0, len(self.task) - 1),
        ]
        if self.token_at is not None:
            ranges.append(("token_at", self.token_at, -1, k_len - 1))
        for name, values, low, high in ranges:
            if values.numel() and (int(values.min()) < low or int(values.max()) > high):
                raise UnsupportedCall(
                    f"block list `{name}` points outside",
                    expected=f"{low} to {high}",
                    got=f"{int(values.min())} to {int(values.max())}",
                )
        if self.token_at is None and (self.q_slots, self.k_slots) != (q_len, k_len):
            raise UnsupportedCall(
                "the program was made for other lengths",
                expected=f"{self.q_slots} queries, {self.k_slots} keys",
                got=f"{q_len} queries, {k_len} keys",
            )
        if slots != self.k_slots or bool((self.indptr.diff() < 0).any()):
            raise UnsupportedCall("the program's lists do not fit each other", got=f"{slots} slots")


_PROGRAMS: WeakKeyDictionary[BlockMask, dict[tuple[torch.device, int, int, int], Program]]
_PROGRAMS = WeakKeyDictionary()


def program(mask: BlockMask, call: AttentionCall) -> Program:
    """Return the program of a mask for a call's lengths, heads and device; built once for each."""
    made = _PROGRAMS.setdefault(mask, {})
    wanted = (call.query.device, call.head_count, call.query.shape[1], call.key.shape[1])
    if wanted not in made:
        made[wanted] = build_program(mask, *wanted)
    return made[wanted]


def build_program(
    mask: BlockMask, device: torch.device, heads: int, q_len: int, k_len: int
) -> Program:
    """Return a fresh program; the lists are made where the mask lives, then moved once."""
    order = mask.order
    q_slots, k_slots, index = q_len, k_len, None
    if order is not None:
        extra = torch.arange(order.tokens, k_len, device=order.index.device)
        q_slots, k_slots = order.slots, order.slots + len(extra)
        index = torch.cat((order.index, extra.expand(order.index.shape[0], -1)), dim=1).int()
    lists = mask.lists()
    counts = lists.indptr.diff().long()
    whole, block, tile = counts, lists.block, lists.tile
    masked = mask.tiles is not None or _has_holes(mask, k_slots)
    if masked:
        cut = (tile >= 0) | _blocks_with_holes(mask, index, k_slots, tile.device)[block.long()]
        row = torch.repeat_interleave(
            torch.arange(len(counts), device=tile.device), counts, output_size=len(block)
        )
        by_part = torch.argsort(row * 2 + cut, stable=True)
        whole = torch.zeros_like(counts).index_add_(0, row, (~cut).long())
        block, tile = block[by_part], tile[by_part]
    words, tile = _tile_words(mask, tile)
    built = Program(
        _launch_order(counts.view(mask.keep.shape[0], -1), heads),
        lists.indptr,
        (lists.indptr[:-1] + whole).int(),
        block.contiguous(),
        tile,
        words,
        index,
        mask.q_block,
        mask.kv_block,
        q_slots,
        k_slots,
        masked,
        mask.computed,
    )
    moved = (t.to(device) if isinstance(t, torch.Tensor) else t for t in built)
    built = Program(*moved)  # type: ignore[arg-type]
    if os.environ.get("DITTOOLS_DEBUG") == "1":
        built.check(q_len, k_len)
    return built


def _has_holes(mask: BlockMask, k_slots: int) -> bool:
    """Whether a key block may reach past the keys or hold a padding slot."""
    ragged = k_slots < mask.kv_slots
    return ragged or (mask.order is not None and mask.order.has_padding)


def _blocks_with_holes(
    mask: BlockMask, index: torch.Tensor | None, k_slots: int, device: torch.device
) -> torch.Tensor:
    """Return bool [kv_blocks]: the block reaches past the keys or holds a padding slot."""
    slot = torch.arange(mask.kv_slots, device=device)
    real = slot < k_slots
    if index is not None:
        real &= F.pad((index >= 0).all(0).to(device), (0, mask.kv_slots - k_slots))
    return ~real.view(-1, mask.kv_block).all(1)


def _tile_words(mask: BlockMask, tile: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Repack bit tiles as words; entries without one get a tile of ones, so no kernel branches."""
    if mask.tiles is None:
        return None, tile.clamp(min=0)
    tiles = torch.cat((mask.tiles, torch.full_like(mask.tiles[:1], 255)))
    tiles = F.pad(tiles, (0, -tiles.shape[-1] % (WORD // 8))).contiguous()
    return tiles.view(torch.int32), torch.where(tile < 0, len(tiles) - 1, tile).int()


def _launch_order(counts: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows: heads one after another, densest first, and the short rows of all at the end.

    Within a head the longest row starts first. Running a head at a time keeps its keys and values
    in the cache; the short rows left for the end level the finish.
    """
    counts = counts.expand(heads, -1)
    by_length = counts.sort(dim=1, descending=True, stable=True)
    done = by_length.values.cumsum(1).double()
    long = (done <= LONG_SHARE * done[:, -1:]).flatten()
    head = counts.sum(1).argsort(descending=True, stable=True).argsort()  # rank of each head
    first = torch.arange(heads, device=counts.device)[:, None] * counts.shape[1]
    task = (first + by_length.indices).flatten()
    rank = head[:, None].expand(heads, counts.shape[1]).flatten()
    behind = heads - by_length.values.flatten()  # short rows: after all heads, longest first
    place = torch.where(long, rank, behind + by_length.values.amax())
    return task[place.argsort(stable=True)].int()


@torch.library.custom_op("dittools::block_sparse", mutates_args=())
def block_sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    task: torch.Tensor,
    indptr: torch.Tensor,
    masked_from: torch.Tensor,
    block: torch.Tensor,
    tile: torch.Tensor,
    words: torch.Tensor | None,
    token_at: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    q_block: int,
    kv_block: int,
    q_slots: int,
    k_slots: int,
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, S, H, D] and the log-sum-exp float32 [B, S, H] of one `Program`.

    CUDA tensors go to the Triton kernel, others to the plain-torch specification.

    Args:
        query, key, value: [B, S, H, D] and [B, S_k, H, D], any strides, one dtype and device.
        task, indptr, masked_from, block, tile, words, token_at: see `Program`.
        bias: float [B or 1, H or 1, S_k] added to the scaled scores; -inf drops a key.
        scale: factor on the scores.
        q_block, kv_block, q_slots, k_slots, masked: see `Program`.
    """
    made = Program(
        task, indptr, masked_from, block, tile, words, token_at,
        q_block, kv_block, q_slots, k_slots, masked, 0.0,
    )  # fmt: skip
    if os.environ.get("DITTOOLS_DEBUG") == "1":
        made.check(query.shape[1], key.shape[1])
    if query.device.type == "cuda":
        from dittools.kernels.triton_block_sparse import launch

        return launch(query, key, value, made, bias, scale)
    return _reference(query, key, value, made, bias, scale)


@block_sparse.register_fake
def _(query: torch.Tensor, key: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(
        (batch, length, heads), dtype=torch.float32
    )


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: Program,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from dittools.kernels.reference import ReferenceBackend

    grid = TokenGrid(1, 1, query.shape[1])
    call = AttentionCall(query, key, value, grid, scale=scale, key_bias=bias)
    mask = _mask_of(made, query.shape[1], key.shape[1])
    out, lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
    return out.contiguous(), lse.float().contiguous()


def _mask_of(made: Program, q_len: int, k_len: int) -> BlockMask:
    """Turn a program back into the mask it was made of."""
    q_blocks, kv_blocks = -(-made.q_slots // made.q_block), -(-made.k_slots // made.kv_block)
    counts = made.indptr.diff().long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    keep = torch.zeros((len(counts), kv_blocks), dtype=torch.bool, device=counts.device)
    keep[row, made.block.long()] = True
    tile_index, tiles, order = None, None, None
    if made.words is not None:
        tile_index = torch.full(keep.shape, -1, dtype=torch.int32, device=counts.device)
        tested = torch.arange(len(row), device=row.device) >= made.masked_from[row]
        tile_index[row, made.block.long()] = torch.where(tested, made.tile, -1)
        tile_index = tile_index.view(-1, q_blocks, kv_blocks)
        tiles = made.words.view(torch.uint8)[..., : -(-made.kv_block // 8)]
    if made.token_at is not None:
        order = TokenOrder(made.token_at[:, : made.q_slots].long(), q_len)
    return BlockMask(
        keep.view(-1, q_blocks, kv_blocks),
        (made.q_block, made.kv_block),
        tile_index=tile_index,
        tiles=tiles,
        order=order,
        q_tokens=q_len,
        kv_tokens=k_len,
    )
