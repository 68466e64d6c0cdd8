"""HeadHunter on an attached denoiser: one more pass per step with perturbed heads, and its use.

The guidance adds d = scale (eps_c - eps_p) to what a step predicts. Classifier-free guidance weighs
its predictions so that the weights sum to 1, so adding the same d to each of them adds d to the
result: eps_u + g (eps_c - eps_u) + d, whatever g is and wherever the pipeline keeps it.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dittools.errors import AttachError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.methods.headhunter import HeadHunter, head_name
from dittools.patches.batch import Rows, rows_of, take
from dittools.patches.perturb import Plain, perturb
from dittools.patches.sites import SeamCall, Site
from dittools.patches.timing import Stopwatch
from dittools.plans.plan import HeadRule

if TYPE_CHECKING:
    from dittools.patches.root import Root

BRANCH = "perturbed"
CONDITIONAL = ("cond", "cond_uncond", "")  # names of the call the prompt goes through
# guiders whose weights sum to 1
_LINEAR_GUIDERS = (
    "ClassifierFreeGuidance",
    "SkipLayerGuidance",
    "PerturbedAttentionGuidance",
    "SmoothedEnergyGuidance",
    "AutoGuidance",
)
_CACHES = ("cache", "pyramid", "broadcast", "taylorseer")  # in names of diffusers' cache hooks


class Guide:
    """State of the guidance on one denoiser."""

    def __init__(
        self, spec: HeadHunter, root: "Root", selected: dict[str, tuple[int, ...]]
    ) -> None:
        """Start with no pass run.

        Args:
            spec: heads, weight and strength.
            root: the attached denoiser.
            selected: module path to the selected heads of its site.
        """
        self.spec, self.root, self.selected = spec, root, selected
        self.is_perturbing = False
        self.branch = ""  # of the pass that is perturbed
        self._delta: tuple[int, list[torch.Tensor]] | None = None  # step, d of each prediction
        self._hit = 0  # calls perturbed in the pass under way
        self.reset()

    def reset(self) -> None:
        """Count and time anew."""
        self.passes, self.rows, self.watch = 0, 0, Stopwatch()

    def guided(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """Return the output of a forward with d added; None leaves it as it is.

        Raises:
            UnsupportedCall: d cannot be found or added here; nothing is left unguided in silence.
        """
        root, moment = self.root, self.root.moment
        if self.is_perturbing or not self.spec.needs_pass or moment is None:
            return None
        leaves, tree = tree_flatten(out)
        if moment.branch not in CONDITIONAL:
            deltas = self._known(moment.step, moment.branch)
            return tree_unflatten(_added(leaves, deltas), tree)
        self.branch = moment.branch
        pipe = root.runtime.clock.pipe
        problem = refusal(denoiser, pipe)
        if problem:
            raise UnsupportedCall(problem)
        rows = rows_of(root._bind(denoiser, args, kwargs), root.family.batched, pipe)
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        some_args = [take(value, rows, name) for name, value in zip(names, args, strict=False)]
        some = {name: take(value, rows, name) for name, value in kwargs.items()}
        first = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        with self._perturbing(), self.watch.running(first.device):
            perturbed = self._compiled(denoiser)(*some_args, **some)
        if not self._hit:
            raise UnsupportedCall(
                "no selected head made a call that can be perturbed",
                expected=f"self- or joint attention at {', '.join(self.selected)}",
                got=moment.problem or "no call of these sites saw the whole sequence",
            )
        self.passes += 1
        self.rows += len(range(rows.total)[rows.cond])
        deltas = self._deltas(leaves, tree_flatten(perturbed)[0], rows)
        self._delta = (moment.step, deltas)
        whole = deltas * rows.copies if rows.is_list else [_tiled(d, rows.copies) for d in deltas]
        return tree_unflatten(_added(leaves, whole), tree)

    def _compiled(self, denoiser: torch.nn.Module) -> Any:
        """Return what the pipeline calls: hooks are not traced, but a compiled model they call is.

        A denoiser compiled in place, or block by block, compiles its own calls.
        """
        called = getattr(self.root.runtime.clock.pipe, self.root.component, None)
        return called if getattr(called, "_orig_mod", None) is denoiser else denoiser

    @contextmanager
    def _perturbing(self) -> Iterator[None]:
        self.is_perturbing, self._hit = True, 0
        moment = self.root.moment
        try:
            yield
        finally:
            self.is_perturbing, self.root.moment = False, moment

    def _deltas(
        self, leaves: Sequence[Any], perturbed: Sequence[Any], rows: Rows
    ) -> list[torch.Tensor]:
        """Return d of the rows with the prompt, fp32, one per prediction.

        It is what remains of d once it was added to eps_c and rounded: added to eps_u as well, the
        part that rounding lost there is not multiplied by g.
        """
        plain = [leaf for leaf in leaves if _is_prediction(leaf)]
        plain = plain[rows.cond] if rows.is_list else [leaf[rows.cond] for leaf in plain]
        others = [leaf for leaf in perturbed if _is_prediction(leaf)]
        pairs = zip(plain, others, strict=True)
        return [_difference(one, other, self.spec.scale) for one, other in pairs]

    def _known(self, step: int, branch: str) -> list[torch.Tensor]:
        if self._delta is None or self._delta[0] != step:
            raise UnsupportedCall(
                f"the {branch} pass comes before the one with the prompt",
                expected="the conditional pass first in every step",
                remedy="this pipeline without HeadHunter",
            )
        return self._delta[1]

    def perturb(
        self,
        site: Site,
        call: SeamCall,
        grids: tuple[TokenGrid, ...],
        rules: Sequence[HeadRule],
        plain: Plain,
    ) -> torch.Tensor:
        """Return the attention of a call in the perturbed pass; see `perturb.perturb`."""
        heads = self.selected.get(site.path)
        if heads is None:
            return plain(call, None)
        self._hit += 1
        pairwise = self.root.family.pairwise_mask
        return perturb(call, self.spec, heads, grids, rules, plain, pairwise)


class GuideHook:
    """Forward hook of a denoiser; copies of the model share it, pickles leave it out."""

    def __init__(self, guide: Guide) -> None:
        """Guide one denoiser."""
        self.guide = guide

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """Run the perturbed pass where one is due, and add what it says."""
        return self.guide.guided(denoiser, args, kwargs, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuideHook":
        """Share the hook with the copy."""
        return self

    def __reduce__(self) -> Any:
        """Pickle as a hook that does nothing."""
        return Unguided, ()


class Unguided:
    """What the hook becomes in a pickled model."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def follow(denoiser: torch.nn.Module, guide: Guide) -> None:
    """Put the guidance on a denoiser."""
    denoiser.register_forward_hook(GuideHook(guide), with_kwargs=True)


def unfollow(denoiser: torch.nn.Module) -> None:
    """Take any guidance off a denoiser or a copy of one."""
    for key, hook in list(denoiser._forward_hooks.items()):
        if isinstance(hook, (GuideHook, Unguided)):
            del denoiser._forward_hooks[key]
            denoiser._forward_hooks_with_kwargs.pop(key, None)


def guidance_report(guides: Sequence[Guide | None]) -> dict[str, Any] | None:
    """Return what a report says of the guidance of all denoisers; waits for pending CUDA work."""
    running = [guide for guide in guides if guide is not None]
    if not running:
        return None
    spec = running[0].spec
    return {
        "heads": list(spec.heads),
        "scale": spec.scale,
        "u": spec.u,
        "mode": spec.mode,
        "extra_passes": sum(guide.passes for guide in running),
        "extra_rows": sum(guide.rows for guide in running),
        "extra_ms": sum(guide.watch.total_ms for guide in running),
    }


def selected_heads(
    spec: HeadHunter, denoiser: torch.nn.Module, paths: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the selected heads by module path.

    Args:
        spec: the guidance.
        denoiser: the model.
        paths: its sites that guidance can address, in layer order.
    Raises:
        InputError: a head the model does not have.
    """
    modules: list[Any] = [denoiser.get_submodule(path) for path in paths]
    counts = [int(module.heads) for module in modules]
    found = spec.by_layer(counts, type(denoiser).__name__)
    return {paths[layer]: heads for layer, heads in found.items()}


def all_heads(denoiser: torch.nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the name of every head that guidance can address, in order."""
    modules: list[Any] = [denoiser.get_submodule(path) for path in paths]
    return [
        head_name(layer, head)
        for layer, module in enumerate(modules)
        for head in range(int(module.heads))
    ]


def check_pipeline(pipe: Any, denoiser: torch.nn.Module) -> None:
    """Raise when guidance makes no sense on a pipeline; a bare denoiser passes.

    Raises:
        AttachError: no text conditioning, guidance of its own, or a cache.
    """
    if not isinstance(pipe, torch.nn.Module):
        taken = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in taken and not hasattr(pipe, "blocks"):  # modular ones take keywords
            raise AttachError(
                f"{type(pipe).__name__} takes no prompt: HeadHunter pushes along a text condition",
                remedy="a plan without guidance",
            )
        own = [name for name in ("pag_scale", "image_guidance_scale") if name in taken]
        if own:
            raise AttachError(
                f"{type(pipe).__name__} runs further guided rows of its own ({own[0]})",
                remedy="the text-to-image pipeline of the same model",
            )
    problem = refusal(denoiser, pipe)
    if problem:
        raise AttachError(problem)


def refusal(denoiser: torch.nn.Module, pipe: Any) -> str:
    """Return why guidance cannot run now, "" when it can."""
    if getattr(denoiser, "is_cache_enabled", False) or _has_cache_hook(denoiser):
        return (
            "HeadHunter does not compose with a step cache, which would hand the perturbed pass "
            "blocks of the plain one; call disable_cache() first"
        )
    guider = type(getattr(pipe, "guider", None)).__name__
    if guider not in (*_LINEAR_GUIDERS, "NoneType"):
        return (
            f"{guider} does not combine its predictions linearly, so HeadHunter cannot be added to "
            "them; use ClassifierFreeGuidance"
        )
    return ""


def _has_cache_hook(denoiser: torch.nn.Module) -> bool:
    """Whether a cache was applied to the model itself or to one of its blocks."""
    for part in (denoiser, *(m for child in denoiser.children() for m in child.children())):
        registry = getattr(part, "_diffusers_hook", None)
        names = () if registry is None else registry.hooks
        if any(word in name for name in names for word in _CACHES):
            return True
    return False


def _is_prediction(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _difference(plain: torch.Tensor, perturbed: torch.Tensor, scale: float) -> torch.Tensor:
    delta = scale * (plain.float() - perturbed.float())
    if plain.dtype == torch.float32:
        return delta
    return (plain.float() + delta).to(plain.dtype).float() - plain.float()


def _tiled(delta: torch.Tensor, copies: int) -> torch.Tensor:
    return torch.cat([delta] * copies) if copies > 1 else delta


def _added(leaves: Sequence[Any], deltas: Sequence[torch.Tensor]) -> list[Any]:
    """Return the outputs, d added to each prediction in fp32 and rounded once."""
    added, left = [], iter(deltas)
    for leaf in leaves:
        if not _is_prediction(leaf):
            added.append(leaf)
            continue
        delta = next(left, None)
        if delta is None or delta.shape != leaf.shape:
            raise UnsupportedCall(
                "a pass predicts another shape than the one with the prompt",
                expected="none" if delta is None else str(tuple(delta.shape)),
                got=str(tuple(leaf.shape)),
            )
        added.append((leaf.float() + delta).to(leaf.dtype))
    return added
