"""Shadow processor classes: the stock `__call__` with only its two attention symbols replaced.

A shadow is a subclass of one stock processor class whose `__call__` runs the stock code over copied
globals in which `dispatch_attention_fn` and `F.scaled_dot_product_attention` lead to the current
site. `processor.__class__` is swapped, so the object, its attributes and its signature stay.
"""

import copy
import copyreg
import functools
import itertools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dittools.patches.op import attend_op
from dittools.patches.sites import ORIGINALS, SITE_ATTRIBUTE, SeamCall, Site

_DISPATCH = "dispatch_attention_fn"
_SDPA = "scaled_dot_product_attention"
_LOCK = threading.RLock()
_SHADOWS: dict[type, type] = {}
_COUNTER = itertools.count()


class _Current(threading.local):
    """The site whose processor runs in this thread; the attribute must exist for Dynamo."""

    def __init__(self) -> None:
        self.site: Site | None = None


_current = _Current()


class Overlay(NamedTuple):
    """Copied globals of one module, and the functions rebound to them so far."""

    module: types.ModuleType
    functions: dict[Any, Any]


# by id of the globals they copy: `functools.wraps` copies `__module__`, so a name would mislead.
# The overlay keeps the original dict alive, so an id is never reused.
_OVERLAYS: dict[int, tuple[dict[str, Any], Overlay]] = {}


def is_shadow(kind: type) -> bool:
    """Whether a class was made by `shadow_of`."""
    return "_dit_stock" in kind.__dict__


def stock_of(kind: type) -> type:
    """Return the stock class behind a shadow, any other class as it is."""
    stock: type = kind.__dict__.get("_dit_stock", kind)
    return stock


def shadow_of(kind: type) -> type | None:
    """Return the shadow of a processor class; None when its attention cannot be intercepted."""
    if is_shadow(kind):
        return kind
    with _LOCK:
        if kind not in _SHADOWS:
            call = getattr(kind, "__call__", None)  # noqa: B004 - the function itself is needed
            if not isinstance(call, types.FunctionType) or not reaches_attention(call):
                return None
            _SHADOWS[kind] = _make_shadow(kind, call)
        return _SHADOWS[kind]


def reaches_attention(function: types.FunctionType) -> bool:
    """Whether a function reaches one of the two symbols, directly or through helpers."""
    return _reaches(function, set())


def _make_shadow(kind: type, call: types.FunctionType) -> type:
    rebound = _rebind(call)

    @functools.wraps(call)
    def shadow_call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        previous = _current.site
        _current.site = getattr(attn, SITE_ATTRIBUTE, None)
        try:
            return rebound(self, attn, *args, **kwargs)
        finally:
            _current.site = previous

    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Pickle as the stock class, which needs no dittools to load."""
        _, _, *rest = super(shadow, self).__reduce_ex__(protocol)
        # not copyreg.__newobj__, which the pickler ties to the object's own class
        return (copyreg._reconstructor, (kind, object, None), *rest)  # type: ignore[attr-defined]

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        """Copy as a shadow, so that a copied model stays attached."""
        twin = shadow.__new__(shadow)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    names = {
        "__call__": shadow_call,
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deepcopy,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_dit_stock": kind,
    }
    shadow: Any = type(kind.__name__, (kind,), names)
    _register_metadata(kind, shadow)
    made: type = shadow
    return made


def _register_metadata(kind: type, shadow: type) -> None:
    """Let diffusers' skip-layer guidance find the shadow: it looks up the exact class."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
    except ImportError:  # diffusers before 0.35 has no registry to look anything up in
        return
    try:
        metadata = AttentionProcessorRegistry.get(kind)
    except ValueError:  # the stock class is not registered either
        return
    AttentionProcessorRegistry.register(shadow, metadata)


def _code_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _code_names(constant)
    return names


def _reaches(function: types.FunctionType, seen: set[int]) -> bool:
    if id(function) in seen:
        return False
    seen.add(id(function))
    names = _code_names(function.__code__)
    scope = function.__globals__
    if _DISPATCH in names and _DISPATCH in scope:
        return True
    if _SDPA in names and (scope.get("F") is F or _SDPA in scope):
        return True
    helpers = [scope.get(name) for name in names] + _closure(function)
    return any(isinstance(h, types.FunctionType) and _reaches(h, seen) for h in helpers)


def _closure(function: types.FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # an empty cell has no contents to look at
        return False
    return True


def _rebind(function: types.FunctionType) -> types.FunctionType:
    """Return a function with the same code over the overlay of its globals."""
    overlay = _overlay(function.__globals__)
    if function in overlay.functions:
        twin: types.FunctionType = overlay.functions[function]
        return twin
    cells = tuple(_rebind_cell(cell) for cell in function.__closure__ or ()) or None
    twin = types.FunctionType(
        function.__code__,
        overlay.module.__dict__,
        function.__name__,
        function.__defaults__,
        cells,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__qualname__ = function.__qualname__
    overlay.functions[function] = twin
    for name in _code_names(function.__code__):
        helper = function.__globals__.get(name)
        if name != _DISPATCH and isinstance(helper, types.FunctionType) and _reaches(helper, set()):
            overlay.module.__dict__[name] = _rebind(helper)
    return twin


def _rebind_cell(cell: Any) -> Any:
    """A decorated `__call__` holds the stock function in a closure cell."""
    held = cell.cell_contents if _is_filled(cell) else None
    if isinstance(held, types.FunctionType) and _reaches(held, set()):
        return types.CellType(_rebind(held))
    return cell


def _overlay(scope: dict[str, Any]) -> Overlay:
    """Return the copy of some globals in which the two symbols lead to the current site.

    Registered in sys.modules under a name of its own: Dynamo imports globals through `__name__`.
    """
    if id(scope) in _OVERLAYS:
        return _OVERLAYS[id(scope)][1]
    name = f"dittools_overlay_{next(_COUNTER)}_{str(scope.get('__name__')).replace('.', '_')}"
    module = types.ModuleType(name)
    module.__dict__.update(scope)
    module.__dict__["__name__"] = name
    if callable(scope.get(_DISPATCH)):
        module.__dict__[_DISPATCH] = _dispatch_seam(scope[_DISPATCH])
    if scope.get("F") is F:
        module.__dict__["F"] = _functional_overlay()
    if callable(scope.get(_SDPA)):
        module.__dict__[_SDPA] = _sdpa_seam(scope[_SDPA])
    sys.modules[name] = module
    overlay = Overlay(module, {})
    _OVERLAYS[id(scope)] = (scope, overlay)
    return overlay


@functools.cache
def _functional_overlay() -> types.ModuleType:
    """Return torch.nn.functional with its SDPA leading to the current site."""
    name = "dittools_overlay_functional"
    module = types.ModuleType(name)
    module.__dict__.update(F.__dict__)
    module.__dict__["__name__"] = name
    module.__dict__[_SDPA] = _sdpa_seam(F.scaled_dot_product_attention)
    sys.modules[name] = module
    return module


_DISPATCH_ORDER = (
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
    "attention_kwargs",
)
_SDPA_ORDER = ("attn_mask", "dropout_p", "is_causal")


def _dispatch_seam(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a stand-in for `dispatch_attention_fn`; tensors are [B, S, H, D]."""
    number = ORIGINALS.add(original, heads_first=False)

    def dispatch_attention_fn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        site = _current.site
        if site is None:
            return original(query, key, value, *args, **kwargs)
        options = {**dict(zip(_DISPATCH_ORDER, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            if (
                query.shape[1] != key.shape[1]
                or options.get("parallel_config") is not None
                or options.get("attention_kwargs")
            ):
                return original(query, key, value, *args, **kwargs)
            return _traced(query, key, value, options, site, number)
        call = SeamCall(query, key, value, options, number)
        return site.root.attend(site, call)

    return dispatch_attention_fn


def _sdpa_seam(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a stand-in for `F.scaled_dot_product_attention`; tensors are [B, H, S, D]."""
    number = ORIGINALS.add(original, heads_first=True)

    def scaled_dot_product_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        site = _current.site
        if site is None or query.dim() != 4:
            return original(query, key, value, *args, **kwargs)
        options = {**dict(zip(_SDPA_ORDER, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            if query.shape[2] != key.shape[2]:
                return original(query, key, value, *args, **kwargs)
            return _traced(query, key, value, options, site, number)
        return site.root.attend(site, SeamCall(query, key, value, options, number))

    return scaled_dot_product_attention


def _traced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
    site: Site,
    number: int,
) -> torch.Tensor:
    """Call the opaque op: all that varies between layers and steps is looked up when it runs."""
    backend = options.get("backend")
    scale = options.get("scale")
    out: torch.Tensor = attend_op(
        query,
        key,
        value,
        options.get("attn_mask"),
        site.token,
        number,
        float(options.get("dropout_p") or 0.0),
        bool(options.get("is_causal")),
        None if scale is None else float(scale),
        bool(options.get("enable_gqa")),
        "" if backend is None else str(getattr(backend, "value", backend)),
    )
    return out
