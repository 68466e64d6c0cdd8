"""Context parallelism: where a rank holds some heads of the whole sequence, the plan runs on those.

diffusers' Ulysses splits the tokens over ranks; before attention an exchange gives every rank all
tokens of some heads, after it another gives them back. Between the two the call is an ordinary one
of fewer heads: tokens are brought into their true order, the plan is cut to the rank's heads, and
heads are dealt out so that ranks have equal work. Everything that decides whether ranks exchange at
all follows from what all of them know; what only a rank knows decides nothing but its own kernel.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch

from dittools.call import AttentionCall, Peers
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.patches.halo import attend_halo, find_bands, halo_refusal
from dittools.patches.inputs import by_head
from dittools.patches.perturb import restricted
from dittools.patches.refusals import finite_flag, parallel_refusal
from dittools.patches.runtime import Moment, Tally
from dittools.patches.sites import SeamCall, Site
from dittools.patches.split import Link, Split, find_split, piece
from dittools.plans.balance import Owners, assign, capacities, head_work, in_order
from dittools.plans.plan import HeadRule

if TYPE_CHECKING:
    from dittools.patches.root import Root

_LATE = 10**9  # a step past the first ones, where the length of a run is not known


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's part of one call: some heads, all tokens.

    Attributes:
        heads: of the site, ascending.
        owners: rank of every head of the site.
        groups: all heads of the site that each of this rank's methods runs.
        link: the ranks.
        is_finite: whether the inputs of all heads are, as far as that is asked.
    """

    heads: tuple[int, ...]
    owners: Owners
    groups: tuple[tuple[int, ...], ...]
    link: Link
    is_finite: bool

    def part(self, call: AttentionCall, whole: AttentionCall) -> AttentionCall:
        """Return the call of one method, knowing what other ranks run of it.

        Its memory is the one the method would have in one process.
        """
        heads = call.head_index
        group = next(group for group in self.groups if heads[0] in group)
        memory = whole.memory
        if len(group) < len(self.owners):
            memory = memory.setdefault(f"heads {group}", {})
        peers = None
        if len(group) > len(heads):
            owners = [self.owners[head] for head in group]
            own = tuple(group.index(head) for head in heads)
            peers = Peers(len(group), own, lambda t: self.link.gather_heads(t, owners))
        return replace(call, memory=memory, peers=peers)


class Parallel:
    """Runs the calls of one denoiser that context parallelism has split."""

    def __init__(self, root: "Root") -> None:
        """Start without having dealt any heads."""
        self.root = root
        self._owners: dict[Any, Owners] = {}

    def attend(self, site: Site, call: SeamCall, moment: Moment, tally: Tally) -> torch.Tensor:
        """Return the attention of one split call, in the layout it came in.

        Raises:
            UnsupportedCall: heads cannot be spread over the ranks, which stock diffusers cannot do
                either.
        """
        runtime, reason = self.root.runtime, parallel_refusal(call)
        if reason:
            tally.dense += 1
            tally.fallbacks[reason] += 1
            return call.dense()
        config = call.options["parallel_config"].context_parallel_config
        heads, ranks = call.query.shape[2], int(config.ulysses_degree)
        is_anything = bool(getattr(config, "ulysses_anything", False))
        if runtime.exchange != "halo":
            _check_heads(heads, ranks, is_anything)
        link = Link(config._ulysses_mesh.get_group(), int(config._ulysses_local_rank), ranks)
        try:
            split = find_split(moment.layout, site.path, call.query.shape[1], link)
            reason = moment.problem or f"{call.query.shape[1]} tokens a rank fit no token grid"
        except UnsupportedCall as error:
            split, reason = None, str(error)
        if split is None:
            tally.passed += 1
            tally.fallbacks[reason] += 1
            return call.dense()
        runtime.grids.update(split.grids)
        runtime.ranks = f"rank {link.rank} of {ranks} (Ulysses): densities and times are its own"
        rules = runtime.rules(site, moment.step, moment.steps, heads, moment.branch)
        with runtime.attention.running(call.query.device):
            if runtime.exchange == "halo":
                out = self._halo(call, split, link, rules, tally)
                if out is not None:
                    site.seen.clear()
                    return out
                _check_heads(heads, ranks, is_anything)
            if all(method.name == "dense" for _, method in rules):  # without an exchange of ours
                return self.root._main_call(site, call, split.grids, moment, tally, rules)
            owners = self._deal(site, moment, heads, ranks, split.grids[0])
            return self._exchange(site, call, split, link, owners, rules, moment, tally)

    def _deal(self, site: Site, moment: Moment, heads: int, ranks: int, grid: TokenGrid) -> Owners:
        """Return the rank of every head, the same for a whole run: methods remember their heads."""
        runtime = self.root.runtime
        branch = moment.branch if runtime.plan.needs_branch else ""
        key = (site.name, branch, heads, ranks, grid, moment.steps)
        if key not in self._owners:
            known = runtime.plan.measured.get("densities", {})
            phases: dict[tuple[float, ...], float] = {}
            for step in range(moment.steps) if moment.steps else (_LATE,):
                rules = runtime.rules(site, step, moment.steps, heads, branch)
                work = head_work(rules, grid, heads, known)
                phases[work] = phases.get(work, 0.0) + 1
            self._owners[key] = assign(tuple((n, work) for work, n in phases.items()), ranks)
        return self._owners[key]

    def _halo(
        self,
        call: SeamCall,
        split: Split,
        link: Link,
        rules: list[HeadRule],
        tally: Tally,
    ) -> torch.Tensor | None:
        """Return the attention of this rank's band of an image, None where heads must be dealt."""
        if all(method.name == "dense" for _, method in rules):
            return None
        reason = halo_refusal(call, split, rules)
        if reason:
            tally.fallbacks[f"heads are exchanged, not a halo: {reason}"] += 1
            return None
        bands = find_bands(split, [method for _, method in rules])
        runtime = self.root.runtime
        runtime.ranks = f"rank {link.rank} of {link.ranks} (halo of rows): times are its own"
        return attend_halo(runtime, call, bands, link, rules, tally)

    def _exchange(
        self,
        site: Site,
        call: SeamCall,
        split: Split,
        link: Link,
        owners: Owners,
        rules: list[HeadRule],
        moment: Moment,
        tally: Tally,
    ) -> torch.Tensor:
        """Return the attention of this rank's tokens, run by all ranks on heads of their own."""
        own = tuple(head for head, rank in enumerate(owners) if rank == link.rank)
        gather_seen(site, split, link, own, call.query)

        def forward_op(
            _: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            *__: Any,
            **___: Any,
        ) -> torch.Tensor:
            q, k, v = (split.true_order(t) for t in (query, key, value))
            if attn_mask is not None and attn_mask.shape[-1] == k.shape[1]:
                attn_mask = split.true_order(attn_mask, -1)
            is_finite = not self.root.runtime.check_finite or link.agree(finite_flag(q, k, v))
            groups = tuple(group for group, _ in rules if set(group) & set(own))
            shard = Shard(own, owners, groups, link, is_finite)
            options = {**call.options, "attn_mask": attn_mask, "parallel_config": None}
            part = SeamCall(q, k, v, options, call.number, shard)
            mine = restricted(rules, own)
            out = self.root._main_call(site, part, split.grids, moment, tally, mine)
            return split.rank_order(out)

        return run_ulysses(call, owners, link.ranks, forward_op)


def run_ulysses(call: SeamCall, owners: Owners, ranks: int, forward_op: Any) -> torch.Tensor:
    """Return what diffusers' Ulysses makes of a call with an attention of ours.

    It gives the first heads to the first rank, so heads are put in that order before and back
    after; each rank sees its own in ascending order.
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    q, k, v = call.query, call.key, call.value
    deal = None
    if owners != in_order(len(owners), ranks):
        deal, back = _dealt(owners, q.device)
        q, k, v = (t.index_select(2, deal) for t in (q, k, v))
    options = call.options
    out = _templated_context_parallel_attention(
        q,
        k,
        v,
        options.get("attn_mask"),
        scale=options.get("scale"),
        forward_op=forward_op,
        backward_op=None,
        _parallel_config=options["parallel_config"],
    )
    return cast(torch.Tensor, out if deal is None else out.index_select(2, back))


@lru_cache(maxsize=256)
def _dealt(owners: Owners, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [H] twice: the heads rank by rank, and the place of each head there."""
    heads = torch.tensor(sorted(range(len(owners)), key=lambda head: (owners[head], head)))
    return heads.to(device), heads.argsort().to(device)


def gather_seen(
    site: Site, split: Split, link: Link, own: tuple[int, ...], query: torch.Tensor
) -> None:
    """Replace what the taps caught of this rank's tokens by all tokens; a query by its own heads.

    Only what a method of the plan needs is ever caught, on all ranks alike.
    """
    for name in sorted(site.seen):
        caught = site.seen.pop(name)
        image = [piece(split.streams[-1], rank, link.ranks) for rank in range(link.ranks)]
        joint = [split.local(rank) for rank in range(link.ranks)]
        if name == "unrotated":
            lengths = (image[link.rank], joint[link.rank])
            found = by_head(caught, lengths, query.shape[2], query.shape[3])
            if found is None:
                continue
            caught = found
        if caught.dim() < 3 or caught.shape[1] not in (image[link.rank], joint[link.rank]):
            continue
        is_joint = caught.shape[1] == joint[link.rank]
        whole = link.gather_tokens(caught, joint if is_joint else image)
        whole = split.true_order(whole) if is_joint else whole
        if name == "unrotated":
            whole = whole.index_select(2, torch.tensor(own, device=whole.device))
        site.seen[name] = whole


def _check_heads(heads: int, ranks: int, is_anything: bool) -> None:
    """Raise where Ulysses cannot give every rank heads."""
    each = -(-heads // ranks)
    if heads % ranks == 0 or (is_anything and heads > each * (ranks - 1)):
        capacities(heads, ranks)
        return
    even = [str(d) for d in range(2, heads + 1) if heads % d == 0]
    other = "" if is_anything or heads <= each * (ranks - 1) else ", or ulysses_anything=True"
    raise UnsupportedCall(
        f"{heads} heads cannot be spread evenly over {ranks} Ulysses ranks",
        expected=f"a ulysses_degree of {', '.join(even)}",
        got=str(ranks),
        remedy=f"another degree{other}",
    )
