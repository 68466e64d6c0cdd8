"""What a group of heads takes under one method: choosing and kernel, timed through its attend."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import groupby
from typing import Any, overload

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods import Method
from dittools.plans.phrase import phrase

# the calls of a run that methods tell apart, with the step of ten each is timed at: the first one,
# those of the first half, the one in which the second half begins, and those after it
STATES = {"first": 0, "later": 1, "turn": 8, "late": 9}
_STEPS = 10
# what says how much is kept; a method that differs in nothing else takes as long to choose
_AMOUNTS = frozenset({"density", "ends", "mass", "top_k", "threshold", "least_kept"})
_COARSE = 4  # places per axis of the random fields that tensors are drawn from
_PEAK = 3.0  # standard deviation of the scaled scores


@dataclass(frozen=True)
class GroupCost:
    """Times of one method on some heads of a call, by the state of the run.

    Attributes:
        method: name and parameters, as `phrase` writes them.
        kin: the same without what says how much is kept.
        heads: heads run together.
        choosing_ms: state -> all that is done outside of the backend.
        kernel_ms: state -> the backend's work.
        computed: state -> share of blocks the backend visited, above 1 where patterns are tried.
    """

    method: str
    kin: str
    heads: int
    choosing_ms: dict[str, float]
    kernel_ms: dict[str, float]
    computed: dict[str, float]

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "GroupCost":
        """Return the cost of a JSON object; TypeError, KeyError or ValueError when malformed."""
        times = {
            name: {state: float(content[name][state]) for state in STATES}
            for name in ("choosing_ms", "kernel_ms", "computed")
        }
        return GroupCost(
            str(content["method"]), str(content["kin"]), int(content["heads"]), **times
        )


def kin(method: Method) -> str:
    """Return the phrase of a method without what says how much it keeps."""
    kind: Any = type(method)
    defaults = {
        f.name: f.default for f in fields(kind) if f.name in _AMOUNTS and f.default is not MISSING
    }
    plain: Any = method
    return phrase(replace(plain, **defaults))


class Watched:
    """A backend that notes how long it works, how much it visits, and how much it keeps."""

    def __init__(self, inner: Backend, device: torch.device) -> None:
        """Start with nothing noted."""
        self.inner, self.device, self.name = inner, device, inner.name
        self.ms, self.asked, self.kept, self.calls = 0.0, 0.0, 0.0, 0

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """What the backend says."""
        return self.inner.not_supported(call, mask)

    def note(self, reason: str) -> None:
        """Nothing: a trial is in no report, and what ran is in its times."""

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Never: what the mask costs is the question."""
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return what the backend does."""
        self._note(call, 1.0, 1.0)
        out: torch.Tensor = self._timed(lambda: self.inner.dense(call))
        return out

    @overload
    def block_sparse(self, call: AttentionCall, mask: BlockMask) -> torch.Tensor: ...

    @overload
    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return what the backend does."""
        self._note(call, mask.density, mask.computed)
        keywords = {"return_lse": True} if return_lse else {}
        run: Any = self.inner.block_sparse
        out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
        out = self._timed(lambda: run(call, mask, **keywords))
        return out

    def _note(self, call: AttentionCall, density: float, computed: float) -> None:
        pairs = float(call.query.shape[1] * call.key.shape[1] * call.head_count)
        self.kept += density * pairs
        self.asked += computed * pairs
        self.calls += 1

    def _timed(self, run: Callable[[], Any]) -> Any:
        found: list[Any] = []
        self.ms += clocked(lambda: found.append(run()), self.device)
        return found[0]


def clocked(run: Callable[[], object], device: torch.device) -> float:
    """Return milliseconds of one run, the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1000


def time_group(
    method: Method, call: AttentionCall, backend: Backend
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return choosing ms, kernel ms and share visited by state, of one pass through the states.

    Args:
        method: what runs.
        call: of the group's heads; its memory is left alone.
        backend: a named one.
    Raises:
        UnsupportedCall: the method or the backend cannot run the call.
    """
    device, memory = call.query.device, dict[str, Any]()
    pairs = float(call.grid.total**2 * call.head_count)
    choosing, kernel, computed = {}, {}, {}
    for state, step in STATES.items():
        at = replace(call, step=step, steps=_STEPS, memory=memory)
        watched = Watched(backend, device)
        spent = clocked(lambda a=at, w=watched: method.attend(a, w), device)  # type: ignore[misc]
        choosing[state] = max(spent - watched.ms, 0.0)
        kernel[state], computed[state] = watched.ms, watched.asked / pairs
    return choosing, kernel, computed


def runnable(
    groups: Iterable[tuple[Method, int]], call: AttentionCall, backend: Backend
) -> list[tuple[Method, int, AttentionCall]]:
    """Return the groups a call can be split into, each with its part of the call.

    What cannot run stays dense in a run, and costs what dense attention does.
    """
    found = []
    for method, heads in groups:
        part = call.heads(range(heads))
        if method.not_supported(part):
            continue
        try:
            time_group(method, part, backend)
        except UnsupportedCall:
            continue
        found.append((method, heads, part))
    return found


def sizes_to_time(groups: Iterable[tuple[Method, int]]) -> list[tuple[Method, int]]:
    """Return each method with its smallest, middle and largest number of heads, without repeats."""
    sizes: dict[str, tuple[Method, set[int]]] = {}
    for method, heads in groups:
        sizes.setdefault(phrase(method), (method, set()))[1].add(heads)
    found = []
    for method, counts in sizes.values():
        ordered = sorted(counts)
        picked = {ordered[0], ordered[len(ordered) // 2], ordered[-1]}
        found += [(method, heads) for heads in sorted(picked)]
    return found


def ends_of(methods: Iterable[Method], heads: int) -> list[tuple[Method, int]]:
    """Return the methods to time for many that rise in how much they keep, alone and on all heads.

    Of those that differ in nothing else the first and the last stand for all.
    """
    families: dict[str, list[Method]] = {}
    for method in methods:
        families.setdefault(kin(method), []).append(method)
    ends = {phrase(m): m for found in families.values() for m in (found[0], found[-1])}
    return [(method, size) for method in ends.values() for size in sorted({1, heads})]


def typical_call(
    grid: TokenGrid, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> AttentionCall:
    """Return a call of random tensors that vary slowly over the grid, as a model's do.

    Of plain noise every block is alike: methods that go by the attention mass would keep all.
    """
    generator = torch.Generator().manual_seed(0)

    def field() -> torch.Tensor:
        coarse = torch.randn((1, heads * head_dim, *(_COARSE,) * 3), generator=generator)
        smooth = F.interpolate(coarse, size=grid.shape, mode="trilinear", align_corners=True)
        return smooth[0].flatten(1).t().reshape(grid.tokens, heads, head_dim)

    def whole(video: torch.Tensor) -> torch.Tensor:
        noisy = video + 0.5 * torch.randn(video.shape, generator=generator)
        text = torch.randn((grid.text, heads, head_dim), generator=generator)
        before = text[: grid.text_before]
        return torch.cat((before, noisy, text[grid.text_before :]))[None]

    shared = field()
    key, query = whole(shared), whole(shared)
    query = query * (_PEAK / query.std() / key.std())
    made = (query, key, whole(field()))
    q, k, v = (x.to(device, dtype).contiguous() for x in made)
    return AttentionCall(q, k, v, grid)


def between(costs: Sequence[GroupCost], heads: int, value: Callable[[GroupCost], float]) -> float:
    """Return a value for a number of heads, along the line between the two nearest group sizes.

    Args:
        costs: of one method, at least one.
        heads: heads run together.
        value: what is wanted of each cost, in ms.
    """
    by_heads = sorted(costs, key=lambda c: c.heads)
    points = [(size, [value(c) for c in same]) for size, same in groupby(by_heads, _heads)]
    line = [(size, sum(found) / len(found)) for size, found in points]
    if len(line) == 1:
        return line[0][1] * heads / line[0][0]
    place = min(sum(size < heads for size, _ in line[1:-1]), len(line) - 2)
    (x0, y0), (x1, y1) = line[place], line[place + 1]
    return max(y0 + (y1 - y0) * (heads - x0) / (x1 - x0), 0.0)


def _heads(cost: GroupCost) -> int:
    return cost.heads
