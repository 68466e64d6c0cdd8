"""Putting sites, shadow classes and the root hook on a denoiser, and taking them off again."""

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from dittools.patches.guide import follow, unfollow
from dittools.patches.inputs import needs_of, tap, untap
from dittools.patches.root import Root
from dittools.patches.seam import is_shadow, shadow_of, stock_of
from dittools.patches.sites import SITE_ATTRIBUTE, Site
from dittools.patches.steps import follow_branch, unfollow_branch

# processor class -> how to get the interceptable one back
REMEDIES = {
    "SlicedAttnProcessor": "pipe.disable_attention_slicing()",
    "SlicedAttnAddedKVProcessor": "pipe.disable_attention_slicing()",
    "XFormersAttnProcessor": "pipe.disable_xformers_memory_efficient_attention()",
    "XFormersAttnAddedKVProcessor": "pipe.disable_xformers_memory_efficient_attention()",
    "XFormersJointAttnProcessor": "pipe.disable_xformers_memory_efficient_attention()",
}
_NO_REMEDY = "set_attn_processor with the stock processor of this model"


class RootHook:
    """Forward pre-hook of a denoiser; copies of the model share it, pickles leave it out."""

    def __init__(self, root: Root) -> None:
        """Follow the forwards of one denoiser."""
        self.root = root
        # copies of the denoiser bring modules of their own
        self._modules: weakref.WeakKeyDictionary[torch.nn.Module, list[torch.nn.Module]] = (
            weakref.WeakKeyDictionary()
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note the forward, and shadow processors that were exchanged since the last one."""
        if denoiser not in self._modules:
            self._modules[denoiser] = _attached_modules(denoiser)
        for module in self._modules[denoiser]:
            if not is_shadow(type(module.processor)):
                put_shadow(module)
        self.root.begin(denoiser, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RootHook":
        """Share the hook with the copy; a pipeline that is copied with it has its own steps."""
        self.root.runtime.clock.follow_copies(memo)
        return self

    def __reduce__(self) -> Any:
        """Pickle as a hook that does nothing."""
        return Detached, ()


class Detached:
    """What a root hook becomes in a pickled model."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def select(denoiser: torch.nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Return the module paths of attention sites in execution order."""
    found = []
    for path, module in denoiser.named_modules():
        if not hasattr(module, "processor"):
            continue
        for rank, pattern in enumerate(patterns):
            if re.fullmatch(pattern, path):
                found.append((rank, _natural(path), path))
                break
    return [path for _, _, path in sorted(found)]


def _natural(path: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key in which blocks.10 follows blocks.9."""
    return tuple(
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")
    )


def put_shadow(module: torch.nn.Module) -> bool:
    """Swap the class of a module's processor; False when it cannot be intercepted."""
    processor = module.processor
    shadow = shadow_of(type(processor))
    if shadow is None:
        return False
    processor.__class__ = shadow
    return True


def not_interceptable(module: torch.nn.Module) -> str:
    """Say which processor cannot be intercepted and how to undo it, "" when it can be."""
    kind = stock_of(type(module.processor))
    if shadow_of(kind) is not None:
        return ""
    remedy = REMEDIES.get(kind.__name__, _NO_REMEDY)
    return f"{kind.__name__} cannot be intercepted; undo it with {remedy}"


def install(denoiser: torch.nn.Module, root: Root, paths: list[str]) -> None:
    """Put everything on a denoiser; on an error everything is taken off again."""
    needs = needs_of(root.runtime.plan)
    try:
        for layer, path in enumerate(paths):
            module = denoiser.get_submodule(path)
            site = Site(path, f"{root.component}.{path}", layer, root)
            module.__dict__[SITE_ATTRIBUTE] = site
            root.sites.append(site)
            put_shadow(module)
            tap(module, site, needs)
        root.branch_name = follow_branch(denoiser)
        denoiser.register_forward_pre_hook(RootHook(root), with_kwargs=True)
        if root.guide is not None:
            follow(denoiser, root.guide)
    except BaseException:
        uninstall(denoiser)
        raise


def uninstall(denoiser: torch.nn.Module) -> None:
    """Take everything off a denoiser or a copy of one: its modules are walked, no list is kept."""
    for module in denoiser.modules():
        module.__dict__.pop(SITE_ATTRIBUTE, None)
        untap(module)
        _unshadow(getattr(module, "processor", None))
    # fusing projections the old way sets the processors aside there
    for processor in (getattr(denoiser, "original_attn_processors", None) or {}).values():
        _unshadow(processor)
    for key, hook in list(denoiser._forward_pre_hooks.items()):
        if isinstance(hook, (RootHook, Detached)):
            del denoiser._forward_pre_hooks[key]
            denoiser._forward_pre_hooks_with_kwargs.pop(key, None)
    unfollow_branch(denoiser)
    unfollow(denoiser)


def _unshadow(processor: Any) -> None:
    if is_shadow(type(processor)):
        processor.__class__ = stock_of(type(processor))


def root_of(denoiser: torch.nn.Module) -> Root | None:
    """Return what is attached to a denoiser, None when nothing is."""
    for hook in denoiser._forward_pre_hooks.values():
        if isinstance(hook, RootHook):
            return hook.root
    return None


def _attached_modules(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in denoiser.modules() if m.__dict__.get(SITE_ATTRIBUTE) is not None]
