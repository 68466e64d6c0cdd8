"""Randomised cases of the Triton kernel, and the check that runs them on one device.

Run as a script under TRITON_INTERPRET=1 it checks every case and prints one JSON object per line;
imported, it gives the same cases to the tests that have a GPU.
"""

import json
import random
import sys
from dataclasses import dataclass, replace

import poisoned
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask, pack_bits
from dittools.order import TokenOrder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    seed: int
    dtype: str = "fp32"
    batch: int = 1
    heads: int = 2
    head_dim: int = 64
    grid: tuple[int, int, int] = (3, 7, 9)
    text: int = 0
    extra: int = 0  # keys past the sequence
    q_block: int = 64
    kv_block: int = 64
    mask_heads: int = 2
    cut: bool = True  # keep single pairs, not only whole blocks
    order: str = ""  # "", "shared", "heads", "padded"
    bias: str = ""  # "", "shared", "heads", "dropped"
    layout: str = "plain"  # "packed": slices of one qkv tensor; "heads": [B, H, S, D] underneath
    scale: float | None = None

    @property
    def name(self) -> str:
        parts = [
            f"s{self.seed}",
            self.dtype,
            f"d{self.head_dim}",
            f"{self.q_block}x{self.kv_block}",
        ]
        parts += (
            ["cut"] * self.cut + [self.order] * bool(self.order) + [self.bias] * bool(self.bias)
        )
        return "-".join(parts)


def cases() -> list[Case]:
    """Corners written out, then drawn ones."""
    fixed = [
        Case(0),
        Case(1, cut=False, grid=(1, 1, 64), mask_heads=1),  # one whole block, nothing to test
        Case(2, dtype="bf16", head_dim=128, q_block=128, batch=2),
        Case(3, dtype="fp16", order="padded", text=11, bias="dropped"),
        Case(4, order="heads", extra=13, bias="heads", layout="packed"),
        Case(5, head_dim=40, q_block=16, kv_block=32, grid=(1, 5, 13)),
        Case(6, q_block=48, kv_block=80, layout="heads", scale=0.3),  # not powers of two
        Case(7, q_block=256, kv_block=128, cut=False, order="shared", head_dim=32),
        Case(8, kv_block=16, grid=(2, 5, 10), mask_heads=1, batch=2, bias="shared"),
        Case(9, head_dim=1, grid=(1, 1, 1)),
    ]
    return fixed + [_drawn(seed) for seed in range(10, 26)]


def _drawn(seed: int) -> Case:
    pick = random.Random(seed)
    heads = pick.choice((1, 2, 3))
    order = pick.choice(("", "", "shared", "heads", "padded"))
    q_block = pick.choice((16, 32, 64, 128))
    return Case(
        seed,
        dtype=pick.choice(("fp32", "fp16", "bf16")),
        batch=pick.choice((1, 2)),
        heads=heads,
        head_dim=pick.choice((32, 64, 72, 96, 128)),
        grid=(pick.randint(1, 3), pick.randint(1, 9), pick.randint(3, 9)),
        text=pick.choice((0, 5)),
        extra=pick.choice((0, 0, 9)),
        q_block=q_block,
        kv_block=q_block if order == "padded" else pick.choice((16, 32, 64, 128)),
        mask_heads=pick.choice((1, heads)),
        cut=pick.random() < 0.6,
        order=order,
        bias=pick.choice(("", "shared", "heads", "dropped")),
        layout=pick.choice(("plain", "packed", "heads")),
        scale=pick.choice((None, None, 0.5)),
    )


def build(case: Case, device: str = "cpu") -> tuple[AttentionCall, BlockMask]:
    """Return the call and a mask that keeps about half, with one query block left empty."""
    torch.manual_seed(case.seed)
    grid = TokenGrid(*case.grid, text_after=case.text)
    order = _order(case, grid)
    tokens, slots = grid.total, grid.total if order is None else order.slots
    shape = (case.mask_heads, -(-slots // case.q_block), -(-(slots + case.extra) // case.kv_block))
    keep = torch.rand(shape) < 0.6
    keep[:, -1, 0] = True
    if shape[1] > 2:
        keep[0, 1] = False
    tiles = tile_index = None
    if case.cut:
        dense = torch.rand((3, case.q_block, case.kv_block)) < 0.5
        dense[0, : case.q_block // 2] = False  # rows that keep nothing of the block
        tiles = pack_bits(dense)
        tile_index = torch.randint(-1, 3, shape, dtype=torch.int32).masked_fill(~keep, -1)
    mask = BlockMask(
        keep,
        (case.q_block, case.kv_block),
        tile_index=tile_index,
        tiles=tiles,
        order=order,
        q_tokens=tokens,
        kv_tokens=tokens + case.extra,
    )
    query, key, value = (t.to(device) for t in _tensors(case, tokens))
    bias, key_mask = _bias(case, tokens + case.extra, device)
    call = AttentionCall(
        query, key, value, grid, scale=case.scale, key_bias=bias, key_mask=key_mask
    )
    return call, mask


def _order(case: Case, grid: TokenGrid) -> TokenOrder | None:
    if case.order == "padded":
        return TokenOrder.tiles(grid, (2, case.q_block // 8, 4))
    if case.order:
        count = case.heads if case.order == "heads" else 1
        return TokenOrder(
            torch.stack([torch.randperm(grid.total) for _ in range(count)]), grid.total
        )
    return None


def _tensors(case: Case, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, n, h, d = case.batch, tokens + case.extra, case.heads, case.head_dim
    if case.layout == "packed":
        q, k, v = torch.randn(b, n, 3, h, d).to(DTYPES[case.dtype]).unbind(2)
    elif case.layout == "heads":
        q, k, v = (torch.randn(b, h, n, d).to(DTYPES[case.dtype]).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = (torch.randn(b, n, h, d).to(DTYPES[case.dtype]) for _ in range(3))
    return q[:, :tokens], k, v


def _bias(case: Case, keys: int, device: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if case.bias == "dropped":
        key_mask = torch.ones(case.batch, keys, dtype=torch.bool)
        key_mask[:, keys // 3 : keys // 2] = False
        return None, key_mask.to(device)
    if case.bias:
        heads = case.heads if case.bias == "heads" else 1
        return (2 * torch.randn(1, heads, keys)).to(device), None
    return None, None


def check(case: Case, device: str = "cpu") -> dict[str, object]:
    """Return the largest errors against fp64 beside what the dtype allows."""
    from dittools.kernels.triton_backend import TritonBackend

    call, mask = build(case, device)
    refused = TritonBackend().not_supported(call, mask)
    out, lse = TritonBackend().block_sparse(call, mask, return_lse=True)
    wide = {name: getattr(call, name).double() for name in ("query", "key", "value")}
    exact, exact_lse = ReferenceBackend().block_sparse(replace(call, **wide), mask, return_lse=True)
    low = low_precision(call, mask)
    empty = exact_lse == float("-inf")
    budget = 2 * (float((low - exact).abs().max()) + _rounding(exact, call.query.dtype))
    return {
        "name": case.name,
        "refused": refused,
        "error": float((out.double() - exact).abs().max()),
        "budget": budget,
        "lse_error": float((lse - exact_lse).masked_fill(empty, 0).abs().max()),
        "empty_rows": int(empty.sum()),
        "empty_right": bool(torch.equal(lse == float("-inf"), empty) and not out[empty].any()),
        "finite": bool(out.isfinite().all()),
    }


def _rounding(exact: torch.Tensor, dtype: torch.dtype) -> float:
    return float(exact.abs().max()) * torch.finfo(dtype).eps


def low_precision(call: AttentionCall, mask: BlockMask) -> torch.Tensor:
    """Attention with weights rounded to the dtype before they meet the values, [B, S, H, D]."""
    keep = mask.to_dense().to(call.query.device)
    q, k, v = (t.transpose(1, 2).float() for t in (call.query, call.key, call.value))
    score = q @ k.transpose(2, 3) * call.softmax_scale
    bias = call.additive_mask()
    if bias is not None:
        score = score + bias[:, :, None]
    score = score.masked_fill(~keep, float("-inf"))
    weight = (score - score.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    total = weight.sum(-1, keepdim=True)
    out = weight.to(call.query.dtype).float() @ v / total.clamp(min=1e-30)
    return out.to(call.query.dtype).double().transpose(1, 2)


def quantised(case: Case, values: str, device: str = "cpu") -> dict[str, object]:
    """Return the error of 8-bit attention against fp64, on its own 8-bit numbers and on the call's.

    Keys share a large offset, which rounding to 8 bits would not survive without smoothing.
    """
    from dittools.kernels import triton_quant
    from dittools.kernels.program import program

    call, mask = build(case, device)
    call.key.add_(8.0)
    eight = triton_quant.quantise(call, mask.to(call.query.device), values)
    out, lse = triton_quant.launch_quantised(call, program(mask, call), eight, values)
    wide = {name: getattr(call, name).double() for name in ("query", "key", "value")}
    exact, exact_lse = ReferenceBackend().block_sparse(replace(call, **wide), mask, return_lse=True)
    rounded = _dequantised(eight, mask, {name: t.shape[1] for name, t in wide.items()})
    near, _ = ReferenceBackend().block_sparse(replace(call, **rounded), mask, return_lse=True)
    kept = exact_lse > float("-inf")
    return {
        "name": f"{case.name}-{values}",
        "error": _relative(out, exact),
        "own_error": _relative(out, near),
        "lse_error": float((lse - exact_lse)[kept].abs().max()),
        "empty_right": bool(torch.equal(lse > float("-inf"), kept) and not out[~kept].any()),
        "finite": bool(out.isfinite().all()),
    }


def _relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def _dequantised(eight: object, mask: BlockMask, length: dict[str, int]) -> dict[str, torch.Tensor]:
    """The 8-bit numbers as fp64 tensors in the sequence's order; padding slots are dropped."""
    q_scale = eight.q_scale.repeat_interleave(mask.q_block, 2).transpose(1, 2)[..., None]
    k_scale = eight.k_scale.repeat_interleave(mask.kv_block, 2).transpose(1, 2)[..., None]
    v_scale = 1.0 if eight.v_scale is None else eight.v_scale[:, None].double()
    slots = {
        "query": eight.query.double() * q_scale[:, : eight.query.shape[1]],
        "key": eight.key.double() * k_scale[:, : eight.key.shape[1]],
        "value": eight.value.to(torch.float32).double() * v_scale,
    }
    if mask.order is None:
        return {name: slots[name][:, : length[name]] for name in slots}
    tokens, count = mask.order.tokens, mask.order.slots
    undone = {}
    for name, tensor in slots.items():
        extra = tensor[:, count : count + length[name] - tokens]
        undone[name] = torch.cat((mask.order.undo(tensor[:, :count]), extra), dim=1)
    return undone


def eight_bit_cases() -> list[tuple[Case, str]]:
    """Plain and gathered, ragged and padded, with each form of the values."""
    picked = [
        Case(2, dtype="bf16", head_dim=128, q_block=128, batch=2),
        Case(3, dtype="fp16", order="padded", text=11, bias="dropped"),
        Case(4, dtype="bf16", order="heads", extra=13, bias="heads", head_dim=72),
    ]
    return [(case, values) for case in picked for values in ("half", "int8", "fp8")]


def wired_cases() -> list[tuple[Case, str]]:
    """Calls that ask for few-bit products themselves, whole and cut, ordered, padded, biased."""
    picked = [
        Case(2, dtype="bf16", head_dim=128, q_block=128, batch=2, cut=False),
        Case(3, dtype="fp16", order="padded", text=11, bias="dropped"),
        Case(4, dtype="bf16", order="heads", extra=13, bias="heads", head_dim=72),
        Case(7, dtype="fp16", q_block=64, kv_block=32, mask_heads=1, order="shared"),
    ]
    return [(case, way) for case in picked for way in ("int8", "int8_half")]


def wired(case: Case, way: str, device: str = "cpu") -> dict[str, object]:
    """Return errors of the backend that a call asking for few bits is sent to.

    reference: of the plain-torch specification against fp64; error: of the kernel against fp64;
    apart: between the two; all relative.
    """
    from dittools.kernels import _QUANTISED, load

    call, mask = build(case, device)
    asking = replace(call, quantize=way)
    backend = load(_QUANTISED[way][0])
    out, lse = backend.block_sparse(asking, mask, return_lse=True)
    near, near_lse = ReferenceBackend().block_sparse(asking, mask, return_lse=True)
    wide = {name: getattr(call, name).double() for name in ("query", "key", "value")}
    exact = ReferenceBackend().block_sparse(replace(call, **wide), mask)
    kept = near_lse > float("-inf")
    return {
        "name": f"{case.name}-wired-{way}",
        "backend": backend.name,
        "refused": backend.not_supported(asking, mask),
        "reference": _relative(near, exact),
        "error": _relative(out, exact),
        "apart": _relative(out, near.double()),
        "lse_error": float((lse - near_lse)[kept].abs().max()),
        "empty_right": bool(torch.equal(lse > float("-inf"), kept) and not out[~kept].any()),
        "finite": bool(out.isfinite().all()),
    }


def nan_row(device: str = "cpu") -> dict[str, object]:
    """Return which query rows are NaN after one query row is."""
    from dittools.kernels.triton_backend import TritonBackend

    call, mask = build(Case(0), device)
    call.query[0, 5, 1] = float("nan")
    out = TritonBackend().block_sparse(call, mask)
    bad = out.isnan().any(-1).nonzero().tolist()
    return {"name": "nan-row", "bad": bad}


def poisoned_cases() -> list[Case]:
    """Cut blocks, dropped keys, padding slots and shared masks; the last has whole blocks alone."""
    chosen = [case for case in cases() if case.cut and case.grid[0] * case.grid[1] > 6][:6]
    return [*chosen, Case(36, cut=False, bias="dropped", dtype="fp16")]


def poisoned_case(case: Case, device: str = "cpu") -> dict[str, object]:
    """Return how far a case with NaN and inf in keys and values is from what its rows keep."""
    from dittools.kernels.triton_backend import TritonBackend

    call, mask = build(case, device)
    poisoned.poison(call, case.seed)
    out, lse = TritonBackend().block_sparse(call, mask, return_lse=True)
    _, want_lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
    found = poisoned.disagreement(out, poisoned.row_by_row(call, mask).to(out.device))
    finite = want_lse.isfinite()
    return found | {
        "name": f"{case.name}-poisoned",
        "lse_error": float((lse - want_lse)[finite].abs().max()),
        "same_lse": bool(torch.equal(lse.isfinite(), finite)),
    }


def _nan_filled(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.full(args[0], float("nan"), **kwargs)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.empty = _nan_filled  # type: ignore[assignment]  # an unwritten output must show
    where = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    for one in cases():
        sys.stdout.write(json.dumps(check(one, where)) + "\n")
    if where == "cpu":
        for one, values in eight_bit_cases():
            sys.stdout.write(json.dumps(quantised(one, values)) + "\n")
        for one, way in wired_cases():
            sys.stdout.write(json.dumps(wired(one, way)) + "\n")
    sys.stdout.write(json.dumps(nan_row(where)) + "\n")
    for one in poisoned_cases():
        sys.stdout.write(json.dumps(poisoned_case(one, where)) + "\n")
