"""One attached denoiser: place each attention call, ask the plan, run the method, note the rest."""

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.errors import DitToolsError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout
from dittools.patches.groups import by_tokens, run_groups, view_of
from dittools.patches.guide import BRANCH, Guide
from dittools.patches.inputs import take_seen
from dittools.patches.masks import KeyMask, key_mask
from dittools.patches.parallel import Parallel
from dittools.patches.perturb import restricted, split_refusal
from dittools.patches.recorder import View
from dittools.patches.refusals import (
    NOT_FINITE,
    UNKNOWN_BRANCH,
    UNKNOWN_LENGTH,
    is_finite,
    refusal,
)
from dittools.patches.runtime import Moment, Runtime, Tally
from dittools.patches.sites import SeamCall, Site
from dittools.plans.plan import HeadRule

BATCHED = "cond_uncond"  # diffusers' name of one call for both halves of guidance


class Root:
    """One attached denoiser: follows its forwards and answers its sites."""

    def __init__(self, component: str, family: Family, runtime: Runtime) -> None:
        """Start without sites; `install` adds them."""
        self.component, self.family, self.runtime = component, family, runtime
        self.sites: list[Site] = []
        self.branch_name: Callable[[], str | None] = lambda: None
        self.moment: Moment | None = None
        self.guide: Guide | None = None
        self._parallel = Parallel(self)
        self._unnamed: tuple[int, int] = (-1, 0)  # step, unnamed forwards seen in it
        self._signatures: weakref.WeakKeyDictionary[type, inspect.Signature] = (
            weakref.WeakKeyDictionary()
        )

    def begin(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Take note of a forward that is about to run."""
        runtime = self.runtime
        arguments = self._bind(denoiser, args, kwargs)
        place = runtime.clock.observe(arguments.get(self.family.timestep))
        if runtime.flight is not None:
            runtime.flight.look()
        if place.is_new_run:
            runtime.begin_run()
            self._unnamed = (-1, 0)
        if place.step == place.steps - 1:
            runtime.tell_idle()
        layout, problem = None, ""
        try:
            layout = self.family.layout(arguments, denoiser)
        except DitToolsError as error:
            problem = f"the token grid is not known: {error}"
        guide = self.guide
        perturbing = guide is not None and guide.is_perturbing
        branch = BRANCH if perturbing else self._branch(place.step)
        runtime.forwards[self.component] += 1
        runtime.branches.add(branch)
        runtime.steps_seen.add(place.step)
        self.moment = Moment(layout, problem, place.step, place.steps, branch)

    def _bind(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        kind = type(denoiser)
        if kind not in self._signatures:
            self._signatures[kind] = inspect.signature(kind.forward)
        return self._signatures[kind].bind_partial(denoiser, *args, **kwargs).arguments

    def _branch(self, step: int) -> str:
        """Return the name diffusers gives the forward, else one by its order within the step."""
        name = self.branch_name()
        if name == BATCHED and self.runtime.clock.is_guided is False:
            return "cond"  # pipelines keep the name when the run has no guidance
        if name is not None:
            return name
        at, count = self._unnamed
        count = count if at == step else 0
        self._unnamed = (step, count + 1)
        if count < len(self.family.branches):
            return self.family.branches[count]
        return "" if count == 0 else f"call {count}"

    def attend(self, site: Site, call: SeamCall) -> torch.Tensor:
        """Return the attention of one call, in the layout it came in."""
        runtime, moment = self.runtime, self.moment
        tally = runtime.tally(site)
        if moment is not None and site.name not in moment.fired:
            moment.fired.add(site.name)
            tally.forwards += 1
        axis = 2 if call.heads_first else 1
        tokens = call.query.shape[axis]
        if moment is None or call.query.dim() != 4 or tokens != call.key.shape[axis]:
            tally.passed += 1
            return call.dense()
        if call.options.get("parallel_config") is not None:
            if self.guide is not None and self.guide.is_perturbing:
                raise split_refusal()
            return self._parallel.attend(site, call, moment, tally)
        grids = _place(moment.layout, site, call, tokens)
        if not grids:
            tally.passed += 1
            tally.fallbacks[moment.problem or f"{tokens} tokens do not fit the token grid"] += 1
            return call.dense()
        runtime.grids.update(grids)
        with runtime.attention.running(call.query.device):
            if self.guide is None or not self.guide.is_perturbing:
                return self._main_call(site, call, grids, moment, tally)
            heads = call.query.shape[1 if call.heads_first else 2]
            # the plan of the pass that is being perturbed
            branch = self.guide.branch
            rules = runtime.rules(site, moment.step, moment.steps, heads, branch)

            def plain(some: SeamCall, kept: tuple[int, ...] | None) -> torch.Tensor:
                mine = rules if kept is None else restricted(rules, kept)
                some = some if kept is None else replace(some, heads=kept)
                return self._main_call(site, some, grids, moment, tally, mine)

            return self.guide.perturb(site, call, grids, rules, plain)

    def _main_call(
        self,
        site: Site,
        call: SeamCall,
        grids: tuple[TokenGrid, ...],
        moment: Moment,
        tally: Tally,
        rules: list[HeadRule] | None = None,
    ) -> torch.Tensor:
        """Run one eligible call by the plan, dense where the plan or a reason says so.

        `rules` are given when the call holds only some heads of the site.

        Several grids mean rows of different text length: each row is a call of its own, and what
        pads it stays zero, as nothing reads it.
        """
        runtime = self.runtime
        heads = call.query.shape[1 if call.heads_first else 2]
        if rules is None:
            rules = runtime.rules(site, moment.step, moment.steps, heads, moment.branch)
        if moment.steps == 0 and runtime.plan.needs_steps:
            tally.fallbacks[UNKNOWN_LENGTH] += 1
        if runtime.plan.needs_branch and moment.branch not in ("cond", "uncond", BRANCH):
            tally.fallbacks[UNKNOWN_BRANCH] += 1
        if all(method.name == "dense" for _, method in rules):
            tally.dense += len(grids)
            return call.dense()
        if len(grids) == 1:
            return self._sparse_call(site, call, grids[0], rules, moment, tally)
        site.seen.clear()  # caught for all rows at once
        out = torch.zeros_like(call.query)
        axis = 2 if call.heads_first else 1
        for index, grid in enumerate(grids):
            row = call.row(index, grid.total)
            part = self._sparse_call(site, row, grid, rules, moment, tally)
            out[index : index + 1].narrow(axis, 0, grid.total).copy_(part)
        return out

    def _sparse_call(
        self,
        site: Site,
        call: SeamCall,
        grid: TokenGrid,
        rules: list[HeadRule],
        moment: Moment,
        tally: Tally,
    ) -> torch.Tensor:
        """Run a call the plan wants sparse; the stock function where it cannot be."""
        runtime = self.runtime
        ordinal = moment.ordinals[site.name]
        moment.ordinals[site.name] += 1
        view = None
        if runtime.flight is not None:
            view = view_of(site, call, moment, ordinal, runtime.plan.schedule)
        attention, reason = self._attention_call(site, call, grid, ordinal, moment)
        if attention is None:
            tally.dense += 1
            tally.fallbacks[reason] += 1
            if reason == NOT_FINITE and runtime.flight is not None and view is not None:
                runtime.flight.inputs_not_finite(view, *by_tokens(call))
            return call.dense()
        with runtime.sparse_calls.running(call.query.device):
            return self._run(attention, rules, call, tally, view)

    def _attention_call(
        self, site: Site, call: SeamCall, grid: TokenGrid, ordinal: int, moment: Moment
    ) -> tuple[AttentionCall | None, str]:
        """Return the call as methods see it, or why there is none."""
        reason = refusal(call)
        if reason:
            return None, reason
        q, k, v = by_tokens(call)
        shard = call.shard
        if not (shard.is_finite if shard else not self.runtime.check_finite or is_finite(q, k, v)):
            return None, NOT_FINITE
        mask = self._key_mask(call.options.get("attn_mask"), q, moment)
        if mask.reason:
            return None, mask.reason
        key = (site.name, moment.branch, ordinal)
        seen = take_seen(site, q, grid)
        try:
            return AttentionCall(
                q,
                k,
                v,
                grid,
                layer=site.layer,
                step=moment.step,
                steps=moment.steps,
                branch=moment.branch,
                scale=call.options.get("scale"),
                key_mask=mask.keep,
                memory=self.runtime.recall(key, (q.shape, q.dtype, q.device, grid)),
                head_index=shard.heads if shard else (),
                full=moment.layout.grids[0] if moment.layout and moment.layout.levels else None,
                features=seen.get("features"),
                unrotated=seen.get("unrotated"),
            ), ""
        except UnsupportedCall as error:
            return None, str(error)

    def _key_mask(self, mask: torch.Tensor | None, query: torch.Tensor, moment: Moment) -> KeyMask:
        """Work a mask out once per forward: reading it makes a GPU wait."""
        if mask is None:
            return KeyMask(None)
        if id(mask) in moment.masks:
            return moment.masks[id(mask)][1]
        batch, tokens = query.shape[:2]
        found = key_mask(mask, batch, tokens, self.family.pairwise_mask)
        if mask.numel() <= batch * tokens:  # made once per forward; pairwise ones once per layer
            moment.masks[id(mask)] = (mask, found)
        return found

    def _run(
        self,
        whole: AttentionCall,
        rules: list[HeadRule],
        call: SeamCall,
        tally: Tally,
        view: View | None = None,
    ) -> torch.Tensor:
        """Run each group of heads by its method; see `run_groups`."""
        return run_groups(self.runtime, whole, rules, call, tally, view)


def _place(layout: Layout | None, site: Site, call: SeamCall, tokens: int) -> tuple[TokenGrid, ...]:
    """Return the geometry of a call: one for all rows, or one per row; nothing when none fits."""
    if layout is None:
        return ()
    grid = layout.place(site.path, tokens)
    return (grid,) if grid is not None else layout.by_row(call.query.shape[0], tokens)
