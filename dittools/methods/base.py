"""What a method is, how its parameters are described and checked, and how its mask is run."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of parameters that turns one call into attention."""

    name: ClassVar[str]

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Say, one sentence each, why this call cannot run; empty when it can."""

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""

    def __hash__(self) -> int:
        """Frozen dataclasses are hashable, so methods key caches."""


@runtime_checkable
class GridMethod(Method, Protocol):
    """A method whose mask depends on the grid alone."""

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask of one grid, on the CPU, the same object while it stays cached."""


@dataclass(frozen=True)
class Preset:
    """A method as its authors run it on one model family.

    Attributes:
        method: the method with its parameters.
        dense_steps: leading denoising steps that stay dense, a count, or a share when below 1.
        dense_layers: leading layers that stay dense.
        source: where the numbers come from, one readable phrase.
    """

    method: Method
    dense_steps: float | int
    dense_layers: int
    source: str


def param(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: Sequence[Any] = (),
) -> Any:
    """Return a dataclass field with a help text and the limits that `check_params` enforces."""
    limits = {"least": least, "most": most, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **limits})


def check_params(method: Any) -> None:
    """Check and normalise every parameter of a frozen dataclass: lists to tuples, ints to floats.

    Raises:
        InputError: a parameter has another type or lies outside its limits.
    """
    hints = get_type_hints(type(method))
    for item in fields(method):
        value = getattr(method, item.name)
        if isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        kind = hints[item.name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind in (int, float, bool, str) and (
            not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        ):
            raise bad_param(method, item.name, expected=_wanted(item, kind.__name__))
        if not _fits(value, kind):
            raise bad_param(method, item.name, expected=_words(kind))
        if kind in (int, float) or item.metadata.get("choices"):
            _check_limits(method, item, kind, value)
        object.__setattr__(method, item.name, value)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; what a whole number is also fits a number."""
    inner = get_args(kind)
    if kind is Any or (not inner and not isinstance(kind, type)):
        return True
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[1:] == (...,):
            return all(_fits(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if inner:  # sequences and literals: the method's own checks, and its choices
        return True
    wanted = (int, float) if kind is float else kind
    return isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))


_KINDS = {int: "whole number", float: "number", str: "word"}
_COUNTS = {2: "two", 3: "three", 4: "four"}


def _words(kind: Any) -> str:
    """Describe an annotated type."""
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        each = f"{_KINDS[inner[0]]}s" if inner[0] in _KINDS else f"entries, {_words(inner[0])} each"
        count = "a list of" if inner[1:] == (...,) else _COUNTS.get(len(inner), str(len(inner)))
        return f"{count} {each}"
    if inner:
        return " or ".join(_words(each) for each in inner)
    if kind in _KINDS:
        return f"a {_KINDS[kind]}"
    return {bool: "true or false", type(None): "nothing"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def _check_limits(method: Any, item: Field[Any], kind: Any, value: Any) -> None:
    least, most, above = (item.metadata.get(k) for k in ("least", "most", "above"))
    choices = item.metadata.get("choices")
    wrong = (
        (choices and value not in choices)
        or (kind is float and value != value)
        or (kind is int and abs(value) > _LARGEST)
        or (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
    )
    if wrong:
        raise bad_param(
            method, item.name, expected=_wanted(item, getattr(kind, "__name__", "value"))
        )


def _wanted(item: Field[Any], kind: str) -> str:
    """Describe the values a field takes."""
    if item.metadata.get("choices"):
        return "one of " + ", ".join(repr(c) for c in item.metadata["choices"])
    limits = (("least", "at least"), ("above", "above"), ("most", "at most"))
    parts = [f"{word} {item.metadata[k]}" for k, word in limits if item.metadata.get(k) is not None]
    return " ".join([{"int": "a whole number", "float": "a number"}.get(kind, kind), *parts])


def bad_param(method: Any, name: str, *, expected: str, remedy: str = "") -> InputError:
    """Return the error for one parameter, its help text as the default remedy."""
    item = next(f for f in fields(method) if f.name == name)
    return InputError(
        f"{method.name}: {name} is not usable",
        expected=expected,
        got=repr(getattr(method, name)),
        remedy=remedy or f"{name} is {item.metadata.get('help', 'described in the documentation')}",
    )


_LARGEST = 2**40  # no count or seed is larger, and sums of them stay below 64 bits


@lru_cache(maxsize=64)
def _placed(method: GridMethod, grid: TokenGrid, device: torch.device) -> BlockMask:
    return method.mask(grid).to(device)


def attend_by_grid(
    method: GridMethod, call: AttentionCall, backend: Backend, *, exactly: bool = False
) -> torch.Tensor:
    """Run a method whose mask depends on the grid alone; mask and device copy are cached."""
    mask = _placed(method, call.grid, call.query.device)
    return attend_masked(call, backend, mask, exactly=exactly)


def attend_masked(
    call: AttentionCall, backend: Backend, mask: BlockMask, *, exactly: bool = False
) -> torch.Tensor:
    """Run one mask; dense when it keeps everything.

    Going dense because it is faster is the caller's choice, made where it can be reported; with
    `exactly` the mask changes the picture on purpose, and such a choice is not offered.
    """
    if mask.is_whole:
        return backend.dense(call)
    if exactly and backend.name == "auto":  # a call for the log-sum-exp is never traded for dense
        return backend.block_sparse(call, mask, return_lse=True)[0]
    return backend.block_sparse(call, mask)


def attend_exactly(made: AttentionCall, backend: Backend, mask: BlockMask) -> torch.Tensor | None:
    """Run a mask over a call that a method made of another; None where dense attention is faster.

    Asking for the log-sum-exp tells a backend that dense attention cannot stand in for the mask:
    `made` holds other keys, or the result is corrected afterwards.
    """
    if backend.prefers_dense(made, mask):
        return None
    return backend.block_sparse(made, mask, return_lse=True)[0]


def block_for(grid: TokenGrid) -> int:
    """Return tokens per block: 128, smaller where a sequence would be cut into fewer than 32."""
    size = 128
    while size > 8 and grid.total < 32 * size:
        size //= 2
    return size


def halvings(scale: float) -> tuple[float, float]:
    """Return a power of two and what is left of a scale: one before a product, one after it.

    Half precision holds the products of large queries and keys only once they are scaled, and a
    power of two rounds nothing.
    """
    rest, power = math.frexp(scale)
    return 2.0**power, rest


def attend_per_item(
    call: AttentionCall, run: Callable[[AttentionCall], torch.Tensor]
) -> torch.Tensor:
    """Run a content-dependent method with the batch folded into heads, so that each item chooses.

    `run` sees batch 1 and B * H heads (item-major); a key_mask arrives as -inf in key_bias. A bias
    comes relative to its highest, as a common one is none: methods may take its exponential.
    """
    batch, heads = call.query.shape[0], call.head_count
    if call.key_bias is not None:
        bias = call.additive_mask()
        assert bias is not None
        highest = bias.amax(-1, keepdim=True)  # of the keys that are not masked
        common = torch.where(highest.isfinite(), highest, 0.0)
        call = replace(call, key_bias=call.key_bias - common)
    if batch == 1:
        return run(call)

    def fold(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).flatten(1, 2)[None]

    bias = call.additive_mask()
    if bias is not None:
        bias = bias.expand(batch, heads, -1).reshape(1, batch * heads, -1)
    q, k, v = fold(call.query), fold(call.key), fold(call.value)
    plain = None if call.unrotated is None else fold(call.unrotated)
    peers = None if call.peers is None else call.peers.folded(batch)
    folded = replace(call, query=q, key=k, value=v, key_mask=None, key_bias=bias, peers=peers)
    folded = replace(folded, unrotated=plain, features=None)  # features know no heads
    out = run(replace(folded, items=batch))
    item: torch.Tensor = out[0]
    return item.view(item.shape[0], batch, heads, item.shape[2]).transpose(0, 1)


def once(backend: Backend | None, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return what `make` gives; a backend that tries many variants on one call has it made once.

    Args:
        backend: may have a method `once` of the same arguments, less the backend.
        key: everything but the call that the result depends on.
        make: works it out.
    """
    shared = getattr(backend, "once", None)
    return make() if shared is None else shared(key, make)


def tell(backend: Backend, reason: str) -> None:
    """Let the report say why part of a call did not run as planned; a warning without one."""
    note = getattr(backend, "note", None)
    if note is None:
        warnings.warn(reason, stacklevel=3)
    else:
        note(reason)
