"""The methods: each a frozen dataclass of parameters that runs one attention call."""

from dataclasses import fields
from typing import Any

from dittools.errors import UnknownMethod
from dittools.methods.agent import Agent
from dittools.methods.base import GridMethod, Method, Preset
from dittools.methods.clear import Clear
from dittools.methods.clustered import Clustered
from dittools.methods.dense import Dense
from dittools.methods.freeswim import FreeSwim
from dittools.methods.gna import GNA
from dittools.methods.metered import Metered
from dittools.methods.naming import named, near_miss
from dittools.methods.oracle import OracleTopK
from dittools.methods.paro import PARO
from dittools.methods.presets import ALIASES, COMBINATIONS, DEFAULT_DENSE_STEPS, PUBLISHED
from dittools.methods.psa import PSA
from dittools.methods.radial import Radial
from dittools.methods.random_blocks import RandomBlocks
from dittools.methods.rectified import Rectified
from dittools.methods.sparge import Sparge
from dittools.methods.sparse_vdit import SparseVDiT
from dittools.methods.sta import STA
from dittools.methods.svg import SVG
from dittools.methods.svg2 import SVG2
from dittools.methods.tome import ToMe
from dittools.methods.vmoba import VMoBA

METHODS: dict[str, type[Any]] = {
    m.name: named(m)
    for m in (
        Dense,
        Radial,
        GNA,
        STA,
        Clear,
        SparseVDiT,
        PARO,
        VMoBA,
        Rectified,
        PSA,
        SVG,
        SVG2,
        Sparge,
        FreeSwim,
        Agent,
        ToMe,
        Clustered,
        Metered,
        RandomBlocks,
        OracleTopK,
    )
}

__all__ = [
    "COMBINATIONS",
    "METHODS",
    "GridMethod",
    "Method",
    "Preset",
    "build",
    "preset",
    "to_params",
]


def build(name: str, params: dict[str, Any] | None = None) -> Method:
    """Return the method of that name with these parameters; the rest keep their defaults.

    The name of a published combination stands for its method and parameters.

    Raises:
        UnknownMethod: no method has this name, or it does not take one of the parameters.
        InputError: a parameter has an unusable value.
    """
    kind, known = _kind(name)
    method: Method = kind(**{**known, **(params or {})})
    return method


def to_params(method: Method) -> dict[str, Any]:
    """Return every parameter of a method as JSON values, `build` takes them back."""

    def plain(value: Any) -> Any:
        if hasattr(value, "to_param"):  # an object of JSON values and tensors
            return value.to_param()
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return {f.name: plain(getattr(method, f.name)) for f in fields(_kind(method.name)[0])}


def preset(name: str, family: str) -> Preset:
    """Return a method as published for a model family; its defaults where nothing is published.

    Args:
        name: name in METHODS or in COMBINATIONS.
        family: "wan", "wan22", "hunyuan_video", "cogvideox", "flux", ...; any other name is fine.
    Raises:
        UnknownMethod: no method has this name.
    """
    kind, known = _kind(name)
    key = family.lower().replace("-", "_")
    key = ALIASES.get(key, key)
    found = PUBLISHED.get((name, key))
    if found is not None:
        method = kind(**{**known, **found.params})
        return Preset(method, found.dense_steps, found.dense_layers, found.source)
    if kind is Dense:
        return Preset(kind(), 0, 0, "dense has no settings")
    source = f"no published preset for {family}, using {name}'s defaults"
    if getattr(kind, "acts_early", False):
        return Preset(kind(), 0, 0, source)
    return Preset(kind(**known), DEFAULT_DENSE_STEPS, 0, source + ", a quarter of the steps dense")


def _kind(name: str) -> tuple[type[Any], dict[str, Any]]:
    """Return the class of a name and the parameters the name stands for."""
    method, known = COMBINATIONS.get(name, (name, {}))
    if method not in METHODS:
        names = (*METHODS, *COMBINATIONS)
        raise UnknownMethod(
            "unknown method",
            expected=f"one of {', '.join(names)}",
            got=repr(name),
            remedy=near_miss(name, names),
        )
    return METHODS[method], known
