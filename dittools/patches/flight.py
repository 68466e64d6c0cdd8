"""What the flight recorder sees of the calls of a run, and the heads it keeps dense."""

import logging
import math
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from dittools.call import AttentionCall
from dittools.methods.placing import sent
from dittools.methods.probes import exact_rows, probe_rows, squared_error
from dittools.patches.recorder import (
    BLIND,
    BROKEN,
    FAR,
    HOPELESS,
    IDLE,
    REST_DENSE,
    UNREPAIRED,
    Incident,
    Key,
    Recorder,
    View,
)
from dittools.patches.refusals import NOT_FINITE
from dittools.patches.timing import Stopwatch

logger = logging.getLogger("dittools")

CONFIRM = 4  # times as many rows decide as raise the suspicion
KEPT_INCIDENTS = 256
Dense = Callable[[tuple[int, ...]], torch.Tensor]  # heads of a call -> [B, S, heads, D]


class _Reading(NamedTuple):
    """Numbers of one call that wait on the device, [H] each, by name; see `Flight.check`."""

    view: View
    watched: tuple[int, ...]
    compared: tuple[int, ...]
    numbers: dict[str, torch.Tensor]


class Flight:
    """What the recorder knows of an attachment."""

    def __init__(self, settings: Recorder) -> None:
        """Start with nothing seen."""
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.incidents: list[Incident] = []
        self.left_out = 0  # incidents beyond those kept
        self.errors: dict[tuple[str, int], tuple[float, int]] = {}  # (site, step): sum e^2, calls
        self.watch = Stopwatch()
        self._pending: list[_Reading] = []
        self.begin_run()

    def begin_run(self) -> None:
        """Let every head run as planned again."""
        self.look()
        self._held: dict[str, set[int]] = {}
        self._calm: set[tuple[str, int, str]] = set()  # (site, head, reason) that dense shares
        self._sizes: dict[Key, list[float]] = {}
        self._sampled: set[Key] = set()
        self._suspects: set[Key] = set()
        self._named_inputs = False

    def held(self, view: View) -> tuple[int, ...]:
        """Return the places, in the call, of heads that stay dense."""
        held = self._held.get(view.site)
        return tuple(i for i, head in enumerate(view.heads) if head in held) if held else ()

    def hold(
        self,
        view: View,
        places: Sequence[int],
        reason: str,
        error: float | None = None,
        outcome: str = REST_DENSE,
    ) -> None:
        """Keep heads dense from here on, and say why."""
        heads = tuple(view.heads[i] for i in places)
        self._held.setdefault(view.site, set()).update(heads)
        self._add(view, heads, reason, outcome, error)

    def blind(self, view: View, places: Sequence[int]) -> None:
        """Say once per site that there was no memory to look at a call."""
        heads = tuple(view.heads[i] for i in places)
        if (view.site, -1, BLIND) not in self._calm:
            self._calm.add((view.site, -1, BLIND))
            self._add(view, heads, BLIND, UNREPAIRED)

    def inputs_not_finite(
        self, view: View, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Name the first call of a run that was given NaN or infinity; later ones follow from it.

        Tensors are [B, S, H, D]; nothing sparse is run on them.
        """
        if self._named_inputs:
            return
        self.look()  # a call before it may be the cause
        names, bad = [], torch.zeros(query.shape[2], dtype=torch.bool)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            found = ~tensor.isfinite().transpose(0, 2).flatten(1).all(1).cpu()
            names += [name] if bool(found.any()) else []
            bad |= found
        if names:
            self._named_inputs = True
            heads = tuple(view.heads[i] for i in bad.nonzero().flatten().tolist())
            self._add(view, heads, f"{NOT_FINITE} ({', '.join(names)})", UNREPAIRED)

    def check(
        self,
        view: View,
        call: AttentionCall,
        out: torch.Tensor,
        watched: tuple[int, ...],
        dense: Dense,
        compared: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Return the output of a call, mended where it is broken.

        Args:
            view: which call.
            call: all its heads.
            out: [B, S, H, D], what is to go out.
            watched: places of the heads that a method ran.
            dense: computes heads of the call as the stock pipeline would.
            compared: those of the watched whose method means to be close to dense; None for all.
        """
        settings, device = self.settings, out.device
        compared = watched if compared is None else compared
        now = device.type == "cpu" if settings.each_call is None else settings.each_call
        with self.watch.running(device):
            found = out.detach()
            is_suspect = view.key in self._suspects
            is_due = is_suspect or self._is_due(view)
            numbers = {}
            if (view.step + view.layer) % max(1, settings.every // 4) == 0:
                numbers["size"] = _size(found)
            if not now and not is_suspect:
                self._wait_for(view, call, found, (watched, compared), numbers, is_due)
                return out
            self._suspects.discard(view.key)
            read = {name: tensor.tolist() for name, tensor in numbers.items()}
            bad = self._judge(view, call, found, (watched, compared), read.get("size"), is_due)
        return self._mended(view, out, bad, dense) if bad else out

    def _wait_for(
        self,
        view: View,
        call: AttentionCall,
        found: torch.Tensor,
        places: tuple[tuple[int, ...], tuple[int, ...]],
        numbers: dict[str, torch.Tensor],
        is_due: bool,
    ) -> None:
        """Leave the numbers of a call on the device until the next forward begins."""
        numbers["sum"] = found.sum((0, 1, 3), dtype=_wide(found))  # finite if everything is
        if is_due:
            self._sampled.add(view.key)
            numbers["apart"], numbers["base"] = self._sample(view, call, found, self.settings.rows)
            numbers["zero"] = _zero_rows(found).sum((0, 1))
        self._pending.append(_Reading(view, *places, numbers))

    def look(self) -> None:
        """Read the numbers that wait, all at once."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        waiting: dict[torch.device, list[torch.Tensor]] = {}
        for reading in pending:
            for tensor in reading.numbers.values():
                waiting.setdefault(tensor.device, []).append(tensor.float())
        lines = {device: iter(torch.cat(ts).tolist()) for device, ts in waiting.items()}
        for view, watched, compared, numbers in pending:
            read = {name: list(islice(lines[t.device], len(t))) for name, t in numbers.items()}
            self._late(view, watched, compared, read)

    def _late(
        self,
        view: View,
        watched: tuple[int, ...],
        compared: tuple[int, ...],
        read: dict[str, list[float]],
    ) -> None:
        """Judge a call that is gone: broken heads are held, others in doubt seen at once next."""
        held = self._held.get(view.site, set())
        sums = read["sum"]
        broken = [i for i in watched if not math.isfinite(sums[i]) and view.heads[i] not in held]
        if broken:
            self.hold(view, broken, BROKEN)
        doubt = self._drifted(view, watched, read.get("size"))
        if "zero" in read:
            apart, base, zero = (read[name] for name in ("apart", "base", "zero"))
            self._note_error(view, apart, base)
            calm = [(view.site, head, IDLE) in self._calm for head in view.heads]
            doubt = doubt or any(zero[i] and not calm[i] for i in watched)
            doubt = doubt or any(_ratio(apart[i], base[i]) > self.settings.limit for i in compared)
        if doubt:
            self._suspects.add(view.key)

    def _judge(
        self,
        view: View,
        call: AttentionCall,
        found: torch.Tensor,
        places: tuple[tuple[int, ...], tuple[int, ...]],
        size: list[float] | None,
        is_due: bool,
    ) -> dict[int, tuple[str, float | None]]:
        """Return what is wrong with which heads: place -> (reason, error)."""
        watched, compared = places
        bad: dict[int, tuple[str, float | None]] = {}
        if not math.isfinite(found.sum(dtype=_wide(found))):  # or too large to add up
            for i in watched:
                is_known = (view.site, view.heads[i], BROKEN) in self._calm
                if not is_known and not _is_finite(found[:, :, i]):
                    bad[i] = BROKEN, None
        if self._drifted(view, watched, size) or is_due:
            self._sampled.add(view.key)
            bad |= self._idle(view, call, found, [i for i in watched if i not in bad])
            bad |= self._far(view, call, found, [i for i in compared if i not in bad], bad)
        return bad

    def _is_due(self, view: View) -> bool:
        """Whether a call is to be sampled: sites take turns, and none is left out of a run."""
        wait = -(view.step + view.layer) % self.settings.every
        return wait == 0 or (view.key not in self._sampled and view.step + wait >= view.end)

    def _far(
        self,
        view: View,
        call: AttentionCall,
        found: torch.Tensor,
        sound: list[int],
        bad: dict[int, tuple[str, float | None]],
    ) -> dict[int, tuple[str, float | None]]:
        """Sample a call; more rows decide on heads that seem to be too far from dense."""
        limit = self.settings.limit
        apart, base = (t.tolist() for t in self._sample(view, call, found, self.settings.rows))
        far: dict[int, tuple[str, float | None]] = {}
        if any(_ratio(apart[i], base[i]) > limit for i in sound):
            more = self._sample(view, call, found, CONFIRM * self.settings.rows, again=True)
            ratios = [_ratio(*pair) for pair in zip(*(t.tolist() for t in more), strict=True)]
            far = {i: (FAR, ratios[i]) for i in sound if ratios[i] > limit}
        mended = {*bad, *far}
        self._note_error(view, [0.0 if i in mended else a for i, a in enumerate(apart)], base)
        return far

    def _sample(
        self, view: View, call: AttentionCall, found: torch.Tensor, count: int, again: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return squared error and squared size [H] over rows drawn for this call."""
        seed = zlib.crc32(f"{view.key} {view.step} {again}".encode())
        rows = sent(probe_rows(call.query.shape[1], count, seed), found.device)
        with torch.no_grad():
            some, exact = found.index_select(1, rows), exact_rows(call, rows)
            if call.key_mask is not None:  # nobody reads the rows of padded tokens
                real = call.key_mask.index_select(1, rows)[..., None, None]
                some, exact = some * real, exact * real
            return squared_error(some, exact)

    def _idle(
        self, view: View, call: AttentionCall, found: torch.Tensor, places: list[int]
    ) -> dict[int, tuple[str, float | None]]:
        """Find heads with rows of zeros that would not be so in dense attention."""
        zero = _zero_rows(found)
        if call.key_mask is not None:  # nobody reads the rows of padded tokens
            zero &= call.key_mask[..., None]
        bad: dict[int, tuple[str, float | None]] = {}
        for i in zero.any(1).any(0).nonzero().flatten().tolist():
            name = (view.site, view.heads[i], IDLE)
            if i not in places or name in self._calm:
                continue
            rows = zero[:, :, i].any(0).nonzero().flatten()[: self.settings.rows]
            exact = exact_rows(call, rows)[:, :, i]
            if bool(exact[zero[:, rows, i]].abs().sum() > 0):
                bad[i] = IDLE, 1.0
            else:
                self._calm.add(name)
        return bad

    def _drifted(self, view: View, watched: tuple[int, ...], size: list[float] | None) -> bool:
        """Whether some head's output is of another size than it was; remembers the new one."""
        if size is None:
            return False
        before, self._sizes[view.key] = self._sizes.get(view.key), size
        if before is None or len(before) != len(size):
            return False
        factor = self.settings.drift
        return any(
            math.isfinite(size[i])
            and math.isfinite(before[i])
            and not before[i] / factor <= size[i] <= before[i] * factor
            for i in watched
        )

    def _mended(
        self,
        view: View,
        out: torch.Tensor,
        bad: dict[int, tuple[str, float | None]],
        dense: Dense,
    ) -> torch.Tensor:
        """Return the output with dense attention in the bad heads, which stay dense."""
        places = tuple(sorted(bad))
        exact = dense(places)
        for reason in dict.fromkeys(reason for reason, _ in bad.values()):
            mine = [i for i in places if bad[i][0] == reason]
            lost = [i for i in mine if not _is_finite(exact[:, :, places.index(i)])]
            if lost:
                heads = tuple(view.heads[i] for i in lost)
                self._calm.update((view.site, head, BROKEN) for head in heads)
                self._add(view, heads, HOPELESS, UNREPAIRED)
            rest = [i for i in mine if i not in lost]
            if rest:
                errors = [error for error in (bad[i][1] for i in rest) if error is not None]
                self.hold(view, rest, reason, max(errors, default=None))
        return put_heads(out, places, exact)

    def _note_error(self, view: View, apart: Sequence[float], base: Sequence[float]) -> None:
        """Add the error of one call, all its heads together, to those of its site and step."""
        error = _ratio(sum(apart), sum(base))
        if math.isfinite(error):
            total, calls = self.errors.get((view.site, view.step), (0.0, 0))
            self.errors[view.site, view.step] = total + error**2, calls + 1

    def _add(
        self,
        view: View,
        heads: tuple[int, ...],
        reason: str,
        outcome: str,
        error: float | None = None,
    ) -> None:
        found = Incident(
            view.layer, view.site, heads, view.step, view.branch, reason, outcome, error
        )
        logger.warning("%s", found)
        if len(self.incidents) < KEPT_INCIDENTS:
            self.incidents.append(found)
        else:
            self.left_out += 1


def put_heads(out: torch.Tensor, places: tuple[int, ...], part: torch.Tensor) -> torch.Tensor:
    """Return [B, S, H, D] with some heads exchanged."""
    where = sent(torch.tensor(places), out.device)
    return out.index_copy(2, where, part.to(out.dtype))


def _size(out: torch.Tensor) -> torch.Tensor:
    """Return [H]: the root mean square of every head, from every eighth row if it is long."""
    some = out[:, :: max(1, min(8, out.shape[1] // 256))]
    size: torch.Tensor = torch.linalg.vector_norm(some, dim=(0, 1, 3), dtype=_wide(out))
    return size.mul_((size.numel() / max(some.numel(), 1)) ** 0.5)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zero_rows(out: torch.Tensor) -> torch.Tensor:
    """Return bool [B, S, H]: rows that are zero throughout."""
    norms: torch.Tensor = torch.linalg.vector_norm(out, dim=3)
    return norms == 0


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _ratio(apart: float, base: float) -> float:
    """Return the relative error of two sums of squares."""
    if base == 0:
        return 0.0 if apart == 0 else math.inf
    return math.sqrt(apart / base) if apart >= 0 else math.nan
