"""Clustered sparse attention: groups of tokens see the groups that matter, the rest is made up for.

Queries and keys are put into groups apart, in every head. A group of queries attends to some groups
of keys exactly; the others are left out, or enter the softmax as their mean key and value with the
log of their number. Rows attended exactly may mend what is left. The parts are those of four
publications, which are settings of this method (`preset`, `build`):

    svg_ear            arXiv:2603.08982: k-means, chosen by error per cost, pooled
    sparse_pr          arXiv:2608.18484: groups of alike response, dropped, mended by probe rows
    svoo               arXiv:2603.18636: groups of alike profile, a floor per head, dropped
    cluster_attention  arXiv:2608.26965: groups of equal size, pooled

Differences: shorter sequences get fewer groups; batches work; text is exact both ways; means are
those of the current keys and values even where groups are of an earlier step; SVOO starts from the
means of the last step, and its floors are given (`mass_density` measures them) instead of read from
a profile by step; SparsePR's probe rows stand nearest to means of queries, not of their responses;
of SparsePR's density the text counts for nothing; ClusterAttention samples members evenly.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.methods.base import (
    attend_exactly,
    attend_per_item,
    bad_param,
    check_params,
    once,
    param,
)
from dittools.methods.cluster_layout import (
    Groups,
    KeyTiles,
    group_means,
    key_tiles,
    laid_out,
    tile_counts,
)
from dittools.methods.cluster_mending import mend
from dittools.methods.error_score import group_error
from dittools.methods.kmeans import drawn_tokens
from dittools.methods.partition import (
    PARTITIONS,
    Effort,
    Means,
    grid_points,
    kmeans_labels,
    profile_labels,
    response_labels,
    split_labels,
)
from dittools.methods.placing import sent
from dittools.methods.repair import RIDGE
from dittools.methods.selection import sums_before

SCORES = ("error", "weight", "mass")


@dataclass(frozen=True)
class Clustered:
    """Groups of queries see groups of keys worth their cost; others as means, probe rows mend."""

    name: ClassVar[str] = "clustered"
    partition: str = param("kmeans", "what makes a group", choices=tuple(PARTITIONS))
    q_clusters: int = param(300, "the most groups of queries; 'split' ignores it", least=1)
    k_clusters: int = param(1000, "the most groups of keys; 'split' ignores it", least=1)
    least_queries: int = param(
        250,
        "the least mean number of queries in a group: N tokens get at most N / it groups; the "
        "exact number with 'split'",
        least=1,
    )
    least_keys: int = param(75, "the same for keys: N tokens get at most N / it groups", least=1)
    density: float = param(
        0.2,
        "the share of keys every group of queries attends exactly, probe rows counted in",
        above=0.0,
        most=1.0,
    )
    mass: float = param(
        0.0,
        "the share of its estimated attention whose keys set that number instead; 0 for `density`",
        least=0.0,
        most=1.0,
    )
    score: str = param(
        "error",
        "whether groups of keys are ranked by the error of pooling them per key, by the weight "
        "that dropping them takes away per key, or by mass",
        choices=SCORES,
    )
    skipped: str = param(
        "pooled", "whether skipped groups enter as their means or not", choices=("pooled", "drop")
    )
    least_kept: float | tuple[float, ...] = param(
        0.0,
        "the share of key groups always exact, heaviest first; one number, or one per head",
        least=0.0,
        most=1.0,
    )
    least_budget: float = param(
        0.0, "the share of key groups whose keys the number is at least", least=0.0, most=1.0
    )
    probes: int = param(64, "the rows attended exactly to mend the others; 0 for none", least=0)
    probe_choice: str = param(
        "random",
        "whether those are drawn, or stand nearest the means of the largest groups",
        choices=("random", "groups"),
    )
    gated: bool = param(True, "whether rows held out decide how much is mended")
    learn: str = param(
        "query",
        "what foretells the error of a row: its sparse output, or its query too",
        choices=("output", "query"),
    )
    ridge: float = param(RIDGE, "the penalty of the repair, per row", above=0.0)
    rank: int = param(0, "the directions of the error that are repaired; 0 for all", least=0)
    first_rounds: int = param(50, "the rounds where no means are known", least=1)
    first_sample: int = param(
        16, "the tokens per group they look at, but for the last ones; 0 for all", least=0
    )
    rounds: int = param(2, "the rounds from the means of an earlier step", least=1)
    every: int = param(1, "the steps that groups are used for", least=1)
    settle: float = param(
        0.0, "the share of the run in which they are renewed at every step", least=0.0, most=1.0
    )
    seed: int = param(0, "the start of the random numbers", least=0, most=2**40)
    block_size: int = param(64, "the queries per computed tile", least=8, most=512)
    key_block: int = param(32, "the keys per computed tile", least=8, most=512)

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)
        floors = self.least_kept if isinstance(self.least_kept, tuple) else (self.least_kept,)
        if not floors or not all(0 <= share <= 1 for share in floors):
            raise bad_param(self, "least_kept", expected="numbers from 0 to 1")
        if 0 < self.probes < 8:
            raise bad_param(self, "probes", expected="0, or at least 8")

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no group; a list of floors must fit the heads."""
        extra = call.key.shape[1] - call.grid.total
        reasons = [f"clustered has no group for {extra} extra keys"] if extra else []
        if isinstance(self.least_kept, tuple) and len(self.least_kept) != call.method_heads:
            count = len(self.least_kept)
            reasons.append(f"clustered lists {count} floors for {call.method_heads} heads")
        if call.grid.tokens <= self.probes:
            reasons.append(
                f"clustered needs more tokens than probes ({self.probes}), got {call.grid.tokens}"
            )
        return reasons

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query; the groups stay in call.memory."""
        if self.mass >= 1 or (self.mass == 0 and self.density >= 1):
            return backend.dense(call)
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        groups = self.groups(call, backend)
        if groups.keys.shape[1] == 1:
            return backend.dense(call)
        counts = tile_counts(groups, call.grid, self.block_size, self.key_block)
        tiles = key_tiles(call, groups, self.key_block, counts[1])
        kept = self.kept(call, groups, tiles)
        seen = kept | (groups.queries == 0)[..., None] | (groups.keys == 0)[:, None]
        if bool(seen.all()):
            return backend.dense(call)
        pooled = self.skipped == "pooled"
        laid = laid_out(call, groups, tiles, kept, self.block_size, pooled, counts[0])
        out = attend_exactly(laid.call, backend, laid.mask)
        if out is None:
            return backend.dense(call)
        out = out.gather(1, laid.slot.t()[None, :, :, None].expand_as(call.query))
        if self.probes:
            mend(
                call,
                backend,
                out,
                groups if self.probe_choice == "groups" else None,
                probes=self.probes,
                ridge=self.ridge,
                rank=self.rank,
                gated=self.gated,
                of_query=self.learn == "query",
            )
        return out

    def groups(self, call: AttentionCall, backend: Backend | None = None) -> Groups:
        """Return the groups of a call of batch 1: labels of this step or an earlier one.

        Means are always those of the call's own queries, keys and values. Variants that differ in
        what they keep, not in their groups, share them on a backend that tries several.
        """
        state: dict[str, Any] = call.memory.setdefault(self._key(call), {})
        last = state.get("step", -1)
        if call.step < last or (call.step == last and "labels" not in state):
            state.clear()  # the same step again, or another run: the same groups again
        labels, counts = state.get("labels"), self._counts(call)
        if labels is None or self._is_due(call, last):
            sizes = (*counts, self.least_queries, self.least_keys)
            effort = (self.first_rounds, self.rounds, self.first_sample, self.seed)
            key = ("groups", self.partition, *sizes, *effort, self.every, self.settle, last)
            labels = once(backend, key, lambda: self._labels(call, state.get("means")))
            state["step"] = call.step
            if self.every > 1:
                state["labels"] = tuple(x.to(torch.int32) for x in labels)
        groups = group_means(call, (labels[0].long(), labels[1].long()), counts)
        if self.partition != "split":
            state["means"] = tuple(
                torch.where(sizes[..., None] > 0, mean, old.to(mean.dtype))
                .nan_to_num(0.0, 0.0, 0.0)
                .to(call.query.dtype)  # half the memory in half precision
                for sizes, mean, old in (
                    (groups.queries, groups.query, self._before(call, call.query, 0, state)),
                    (groups.keys, groups.key, self._before(call, call.key, 1, state)),
                )
            )
        return groups

    def _before(
        self, call: AttentionCall, part: torch.Tensor, side: int, state: dict[str, Any]
    ) -> torch.Tensor:
        """Return [H, groups, D]: where an empty group stays."""
        if "means" in state:
            return state["means"][side]  # type: ignore[no-any-return]
        first = call.grid.text_before
        points = part[0, first : first + call.grid.tokens].transpose(0, 1)
        return drawn_tokens(points, self._counts(call)[side], self.seed)

    def _is_due(self, call: AttentionCall, last: int) -> bool:
        settling = call.steps > 0 and call.step < self.settle * call.steps
        return settling or not last <= call.step < last + self.every

    def _counts(self, call: AttentionCall) -> tuple[int, int]:
        """Return the groups of queries and of keys."""
        tokens = call.grid.tokens
        if self.partition == "split":
            return -(-tokens // self.least_queries), -(-tokens // self.least_keys)
        most = (self.q_clusters, self.least_queries), (self.k_clusters, self.least_keys)
        found = [max(1, min(count, tokens // least)) for count, least in most]
        return found[0], found[1]

    def _labels(
        self, call: AttentionCall, means: Means | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = grid_points(call)
        if self.partition == "split":
            return split_labels(query, key, (self.least_queries, self.least_keys))
        effort = Effort(self.first_rounds, self.rounds, self.first_sample, self.seed)
        if means is not None:
            means = (means[0].to(query.dtype), means[1].to(query.dtype))
        ways = {"kmeans": kmeans_labels, "response": response_labels, "profile": profile_labels}
        return ways[self.partition](query, key, self._counts(call), means, effort)

    def kept(self, call: AttentionCall, groups: Groups, tiles: KeyTiles) -> torch.Tensor:
        """Return bool [H, query groups, key groups]: what is attended exactly."""
        scores = groups.query @ groups.key.transpose(1, 2) * call.softmax_scale
        scores = scores + groups.weight.log()[:, None]
        chance = scores.softmax(-1).nan_to_num(0.0)
        count = chance.shape[2]
        sizes = groups.keys.to(chance.dtype)[:, None].expand_as(chance)
        held, heaviest = chance.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(count, device=chance.device)
        always = place < self._floor(call, count).view(-1, 1, 1)
        if self.mass:
            wanted = (sums_before(held) <= self.mass) | always
            wanted = wanted | (place < int(self.least_budget * count + 1e-9))
            budget = (sizes.gather(-1, heaviest) * wanted).sum(-1, keepdim=True)
        else:
            tokens = call.grid.tokens
            least = max(1, ceil(self.density * tokens - self.probes - 1e-9))
            budget = torch.full_like(chance[..., :1], float(least))
        worth = chance if self.score == "mass" else self._worth(call, groups, tiles)
        first = torch.zeros_like(worth, dtype=torch.bool)
        first.scatter_(-1, heaviest, always.expand_as(chance))
        worth = worth.masked_fill(sizes == 0, -1.0).masked_fill(first, float("inf"))
        order = worth.argsort(dim=-1, descending=True, stable=True)
        spent = sizes.gather(-1, order).cumsum(-1)
        taken = spent - sizes.gather(-1, order) < budget
        return first.scatter(-1, order, taken) | first

    def _floor(self, call: AttentionCall, count: int) -> torch.Tensor:
        """Return int64 [H or 1]: key groups that are always exact."""
        shares = self.least_kept if isinstance(self.least_kept, tuple) else (self.least_kept,)
        if len(shares) > 1:  # places past the list belong to further items of a batch
            shares = tuple(shares[place % len(shares)] for place in call.places)
        floors = [max(1, int(share * count + 1e-9)) if share else 0 for share in shares]
        return sent(torch.tensor(floors), call.query.device)

    def _worth(self, call: AttentionCall, groups: Groups, tiles: KeyTiles) -> torch.Tensor:
        """Return [H, query groups, key groups]: error of skipping a group, per key of it."""
        owner, count = tiles.layout.group, groups.keys.shape[1]
        text = (owner >= count).repeat_interleave(self.key_block, dim=1)
        error = group_error(
            groups.query.to(call.query.dtype) * call.softmax_scale,
            tiles.key.transpose(1, 2),
            tiles.value,
            tiles.bias.masked_fill(text, float("-inf")),
            owner,
            (groups.key, groups.value) if self.score == "error" else None,
            count,
        )
        return (error / groups.keys[:, None].clamp(min=1)).nan_to_num(0.0, 0.0, 0.0)

    def _key(self, call: AttentionCall) -> str:
        shape = tuple(call.query.shape[1:])
        return f"clustered {self} {call.grid} {shape} {call.query.dtype} {call.query.device}"
