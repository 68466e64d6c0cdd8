"""Running one call by the rules of a plan: each group of heads by its method, the rest dense."""

from collections.abc import Sequence

import torch

from dittools.call import AttentionCall
from dittools.errors import DitToolsError, UnsupportedCall
from dittools.methods import Method
from dittools.methods.placing import sent
from dittools.patches.flight import put_heads
from dittools.patches.inputs import lacking
from dittools.patches.meter import DENSE_IS_FASTER, Meter
from dittools.patches.recorder import HELD, REST_DENSE, View
from dittools.patches.refusals import KEEPS_ALL
from dittools.patches.rescue import free, is_out_of_memory, stock_heads
from dittools.patches.runtime import Moment, Runtime, Tally
from dittools.patches.sites import SeamCall, Site
from dittools.plans.plan import HeadRule, Schedule

# heads in the call, their method (None for dense), the call of these heads
Group = tuple[tuple[int, ...], Method | None, AttentionCall]


def by_tokens(call: SeamCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value [B, S, H, D], grouped key and value heads repeated."""
    q, k, v = call.query, call.key, call.value
    if call.heads_first:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[2] != q.shape[2] and q.shape[2] % k.shape[2] == 0:
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    return q, k, v


def view_of(site: Site, call: SeamCall, moment: Moment, ordinal: int, schedule: Schedule) -> View:
    """Return how the flight recorder names a call."""
    heads = call.shard.heads if call.shard else call.heads
    heads = heads or tuple(range(call.query.shape[1 if call.heads_first else 2]))
    end = moment.steps - schedule.counts(moment.steps)[1] if moment.steps else 0
    return View(site.layer, site.name, moment.branch, ordinal, moment.step, end, heads)


def run_groups(
    runtime: Runtime,
    whole: AttentionCall,
    rules: list[HeadRule],
    call: SeamCall,
    tally: Tally,
    view: View | None,
) -> torch.Tensor:
    """Return the attention of a call, in its own layout; stock where nothing is sparse.

    Args:
        runtime: plan, backend and flight recorder.
        whole: the call as methods see it.
        rules: which method runs which of its heads.
        call: the call as the stock pipeline made it.
        tally: gets the counts.
        view: the name of the call, None without a flight recorder.
    """

    def stock() -> torch.Tensor:
        out = call.dense()
        return out.transpose(1, 2) if call.heads_first else out

    meter = Meter(runtime.backend, whole, stock, runtime.backend_work)
    groups = _groups(whole, rules, call, tally)
    if all(method is None for _, method, _ in groups):
        tally.dense += 1
        return call.dense()
    work = _Work(runtime, call, meter, view)
    if work.all_held(groups):
        tally.dense += 1
        tally.fallbacks[HELD] += 1
        out = work.dense(tuple(range(whole.head_count)))
        return out.transpose(1, 2) if call.heads_first else out
    try:
        parts = [(heads, work.attend(heads, method, part)) for heads, method, part in groups]
    except UnsupportedCall as error:
        tally.dense += 1
        tally.fallbacks[str(error)] += 1
        return call.dense()
    tally.fallbacks.update(meter.notes)
    out = parts[0][1] if len(parts) == 1 else _scatter(whole, parts)
    out = work.checked(whole, groups, out)
    if work.replaced:
        tally.fallbacks[HELD] += 1
    _note(runtime, meter, whole, tally, quiet=work.replaced)
    return out.transpose(1, 2) if call.heads_first else out


class _Work:
    """One call under way, with the flight recorder where there is one."""

    def __init__(self, runtime: Runtime, call: SeamCall, meter: Meter, view: View | None) -> None:
        """Ask the recorder which heads are dense by now."""
        self.call, self.meter, self.view = call, meter, view
        self.flight = runtime.flight
        self.watch = runtime.backend_work
        held = () if self.flight is None or view is None else self.flight.held(view)
        self.held = frozenset(held)
        self.replaced = False  # whether heads that a method was to run are dense
        self.pieces = 1  # in which they were computed

    def all_held(self, groups: Sequence[Group]) -> bool:
        """Whether no method has a head left; other processes may need one to run all the same."""
        if not self.held or self.call.shard is not None:
            return False
        return all(method is None or self.held.issuperset(heads) for heads, method, _ in groups)

    def dense(self, places: tuple[int, ...]) -> torch.Tensor:
        """Return [B, S, places, D] from the stock function."""
        with self.watch.running(self.call.query.device):
            out, self.pieces = stock_heads(self.call, places)
        self.meter.ran_dense(len(places))
        self.replaced = True
        return out

    def attend(
        self, heads: tuple[int, ...], method: Method | None, part: AttentionCall
    ) -> torch.Tensor:
        """Return the attention of one group, dense once its method has failed.

        Heads that are held are run all the same, as their method may weigh heads against each
        other; `checked` exchanges them.
        """
        if method is None:
            return self.meter.dense(part)
        is_alone = self.call.shard is None  # other processes would wait for this one
        if is_alone and self.held.issuperset(heads):
            return self._in_order(heads)
        try:
            return _fitting(method.attend(part, self.meter), part.query)
        except DitToolsError:
            raise
        except Exception as error:
            if self.flight is None or self.view is None or not is_alone:
                raise
            return self._rescued(heads, part, error)

    def _rescued(
        self, heads: tuple[int, ...], part: AttentionCall, error: Exception
    ) -> torch.Tensor:
        """Return dense attention instead; when that fails too, the first error is the one."""
        assert self.flight is not None
        assert self.view is not None
        part.memory.clear()
        if is_out_of_memory(error):
            free(error, self.call.query.device)
        try:
            out = self._in_order(heads)
        except Exception as again:
            raise error from again
        text = " ".join(str(error).split())[:200]
        outcome = REST_DENSE if self.pieces == 1 else f"{REST_DENSE}, in {self.pieces} pieces"
        reason = f"{type(error).__name__}: {text}"
        self.flight.hold(self.view, sorted(heads), reason, outcome=outcome)
        return out

    def _in_order(self, heads: tuple[int, ...]) -> torch.Tensor:
        """Return dense attention of heads that may be in any order."""
        places = tuple(sorted(heads))
        out = self.dense(places)
        if places == heads:
            return out
        where = sent(torch.tensor([places.index(head) for head in heads]), out.device)
        return out.index_select(2, where)

    def checked(
        self, whole: AttentionCall, groups: Sequence[Group], out: torch.Tensor
    ) -> torch.Tensor:
        """Return the output with held heads dense and, if the recorder finds trouble, others."""
        if self.flight is None or self.view is None:
            return out
        flight, view = self.flight, self.view
        held = set(flight.held(view))
        ours = [_not_skipped(*group) for group in groups]
        if self.call.shard is None:  # a group that is held as a whole is dense already
            ours = [heads for heads in ours if not held.issuperset(heads)]
        run = {head for heads in ours for head in heads}
        late = tuple(sorted(run & held))
        if late:
            out = put_heads(out, late, self.dense(late))
        watched = tuple(sorted(run - held))
        if not watched or (self.meter.declined and not self.meter.was_sparse):
            return out
        meant = {
            head
            for heads, method, _ in groups
            for head in heads
            if getattr(method, "differs_on_purpose", False)
        }
        compared = tuple(head for head in watched if head not in meant)
        try:
            return flight.check(view, whole, out, watched, self.dense, compared)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free(error, out.device)
            flight.blind(view, watched)
            return out


def _fitting(out: object, query: torch.Tensor) -> torch.Tensor:
    """Return what a method gave, in the dtype of the query.

    Raises:
        RuntimeError: it is no attention of these queries.
    """
    if isinstance(out, torch.Tensor) and out.shape == query.shape and out.device == query.device:
        return out.to(query.dtype)
    got = type(out).__name__
    if isinstance(out, torch.Tensor):
        got = f"{list(out.shape)} on {out.device}"
    raise RuntimeError(
        f"the method did not return attention; expected {list(query.shape)} on {query.device}, "
        f"got {got}"
    )


def _not_skipped(
    heads: tuple[int, ...], method: Method | None, part: AttentionCall
) -> tuple[int, ...]:
    """Return the heads that a method computes; what it leaves out is zero on purpose."""
    if method is None:
        return ()
    left_out = getattr(method, "left_out", None)
    skipped = set() if left_out is None else set(left_out(part))
    return tuple(head for place, head in enumerate(heads) if place not in skipped)


def _groups(
    whole: AttentionCall, rules: list[HeadRule], call: SeamCall, tally: Tally
) -> list[Group]:
    """Return the groups of heads; those whose method cannot run them are dense."""
    groups: list[Group] = []
    for heads, method in rules:
        part = whole.heads(heads) if len(rules) > 1 else whole
        if call.shard is not None:
            part = call.shard.part(part, whole)
        reasons = []
        if method.name != "dense":
            reasons = method.not_supported(part) or lacking(method, part)
        for reason in reasons:
            tally.fallbacks[reason] += 1
        groups.append((heads, None if reasons or method.name == "dense" else method, part))
    return groups


def _note(
    runtime: Runtime, meter: Meter, whole: AttentionCall, tally: Tally, *, quiet: bool
) -> None:
    """Count a call as sparse or dense; `quiet` when the reason for dense is known already."""
    density = meter.density(whole)
    if meter.declined:
        tally.fallbacks[DENSE_IS_FASTER] += 1
    if meter.was_sparse or (isinstance(density, float) and density < 1):
        tally.sparse += 1
        known = tally.sparse_density
        if isinstance(known, torch.Tensor) and isinstance(density, torch.Tensor):
            known = known.to(density.device)  # the model may have moved since
        tally.sparse_density = known + density
        runtime.used |= meter.used
        return
    tally.dense += 1
    if not meter.declined and not quiet:
        tally.fallbacks[KEEPS_ALL] += 1


def _scatter(
    whole: AttentionCall, parts: list[tuple[tuple[int, ...], torch.Tensor]]
) -> torch.Tensor:
    """Put the results of groups of heads together, [B, S, H, D]."""
    out = torch.empty_like(whole.query, memory_format=torch.contiguous_format)
    for heads, result in parts:
        where = sent(torch.tensor(heads), out.device)
        out.index_copy_(2, where, result.to(out.dtype))
    return out
