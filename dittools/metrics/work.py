"""Arithmetic and memory traffic counted from shapes, and what the device can do at best."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SDPA = "scaled_dot_product"


@dataclass
class Work:
    """What a run computes and must at least move.

    Attributes:
        attention: FLOPs of self- and joint attention in the denoiser: query and key alike long.
        other: part -> all other FLOPs.
        bytes: part -> bytes read and written by the counted operators, each tensor once.
    """

    attention: float = 0.0
    attention_bytes: float = 0.0
    other: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)

    def flops(self, density: float = 1.0) -> float:
        """Return all FLOPs with self-attention at a density; choosing a mask is not counted."""
        return self.attention * density + sum(self.other.values())

    def traffic(self) -> float:
        """Return bytes; sparse attention still reads every query, key and value once."""
        return self.attention_bytes + sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)


class WorkCounter(TorchDispatchMode):
    """Counts the work of everything that runs inside it; attach nothing, so that attention shows.

    Matrix products, convolutions and attention are counted, 2 FLOPs for each multiply and add.

    Args:
        part: returns the name of the part that is running.
        denoiser: the part whose self-attention is told apart.
    """

    def __init__(self, part: Callable[[], str], denoiser: str = "transformer") -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self._part, self._denoiser = part, denoiser

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and count it."""
        keywords = kwargs or {}
        out = func(*args, **keywords)
        packet = func._overloadpacket
        attention = SDPA in str(packet) and "backward" not in str(packet)
        if attention:
            query, key, value = args[:3]
            flops = attention_flops(query.shape, key.shape, value.shape[-1])
        elif packet in flop_registry:
            flops = float(flop_registry[packet](*args, **keywords, out_val=out))
        else:
            return out
        first = out[0] if isinstance(out, (tuple, list)) else out
        moved = sum(_bytes(item) for item in (*args, first))
        part = self._part()
        if attention and part == self._denoiser and query.shape[-2] == key.shape[-2]:
            self.work.attention += flops
            self.work.attention_bytes += moved
        else:
            self.work.other[part] = self.work.other.get(part, 0.0) + flops
            self.work.bytes[part] = self.work.bytes.get(part, 0.0) + moved
        return out


def attention_flops(query: Any, key: Any, value_dim: int) -> float:
    """Return 2 * B * H * S_q * S_k * (D + D_v) for shapes [B, H, S, D]."""
    batch, heads, q_tokens, head_dim = query
    return float(2 * batch * heads * q_tokens * key[-2] * (head_dim + value_dim))


@dataclass(frozen=True)
class Peak:
    """What the device reached in a short probe.

    Attributes:
        flops_per_s: of a large matrix product.
        bytes_per_s: of a large copy, reads and writes counted.
        how: what was run.
    """

    flops_per_s: float
    bytes_per_s: float
    how: str

    def limit_ms(self, flops: float, traffic: float) -> float:
        """Return the least time for some work: the slower of arithmetic and memory."""
        return 1000 * max(flops / self.flops_per_s, traffic / self.bytes_per_s)

    def to_dict(self) -> dict[str, float | str]:
        """Return the fields as JSON types."""
        return asdict(self)


def probe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Peak:
    """Return what the device reaches, best of five; under a second on either kind."""
    cuda = torch.device(device).type == "cuda"
    side, megabytes = (8192, 1024) if cuda else (1024, 64)
    left = torch.ones(side, side, device=device, dtype=dtype)
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: left @ left, torch.device(device))
    copy = _best(lambda: target.copy_(source), torch.device(device))
    how = f"{side} x {side} {str(dtype).removeprefix('torch.')} product, {megabytes} MiB copy"
    return Peak(2 * side**3 / product, 2 * source.nbytes / copy, how)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of five runs in seconds, after one to warm up."""
    found = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _bytes(item: Any) -> float:
    return float(item.nbytes) if isinstance(item, torch.Tensor) else 0.0
