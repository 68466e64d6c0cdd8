"""Every attention processor of the installed diffusers is interceptable or a known exception."""

import importlib
import inspect
import pkgutil

import diffusers.models
import pytest
from toys import OLD

from dittools.patches.seam import is_shadow, shadow_of, stock_of

# no softmax attention call to intercept, or one that goes another way
EXCEPTIONS = {
    "AttnAddedKVProcessor": "explicit baddbmm",
    "AttnProcessor": "explicit baddbmm",
    "CustomDiffusionAttnProcessor": "explicit baddbmm",
    "CustomDiffusionXFormersAttnProcessor": "xformers",
    "IPAdapterAttnProcessor": "explicit baddbmm",
    "IPAdapterXFormersAttnProcessor": "xformers",
    "LTX2VideoVaeNeighborhoodNattenProcessor": "NATTEN, in an autoencoder",
    "PAGCFGSanaLinearAttnProcessor2_0": "linear attention",
    "PAGIdentitySanaLinearAttnProcessor2_0": "linear attention",
    "SanaLinearAttnProcessor2_0": "linear attention",
    "SanaLinearAttnProcessor3_0": "linear attention",
    "SanaMultiscaleAttnProcessor2_0": "linear attention, in an autoencoder",
    "SlicedAttnAddedKVProcessor": "sliced baddbmm",
    "SlicedAttnProcessor": "sliced baddbmm",
    "XFormersAttnAddedKVProcessor": "xformers",
    "XFormersAttnProcessor": "xformers",
    "XFormersJointAttnProcessor": "xformers",
}


def processors() -> dict[str, type]:
    """Every class of diffusers.models that is called as an attention processor."""
    found = {}
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        if "flax" in info.name:  # gone by 0.42, and needs another framework before
            continue
        module = importlib.import_module(info.name)
        for name, kind in vars(module).items():
            is_own = inspect.isclass(kind) and kind.__module__ == info.name
            if is_own and "Processor" in name and "__call__" in vars(kind):
                found[name] = kind
    return found


def test_processors_reach_attention_or_are_named_exceptions() -> None:
    found = processors()
    assert len(found) >= (60 if OLD else 100)
    blind = {name for name, kind in found.items() if shadow_of(kind) is None}
    assert blind - set(EXCEPTIONS) == set(), "new in diffusers: intercept them or name them"
    assert set(EXCEPTIONS) & set(found) <= blind, "interceptable by now: drop the exception"


@pytest.mark.parametrize("name", ["WanAttnProcessor", "JointAttnProcessor2_0"])
def test_a_shadow_passes_for_its_stock_class(name: str) -> None:
    kind = processors()[name]
    shadow = shadow_of(kind)
    assert shadow is not None
    assert is_shadow(shadow)
    assert shadow_of(kind) is shadow
    assert shadow_of(shadow) is shadow
    assert stock_of(shadow) is kind
    assert issubclass(shadow, kind)
    assert (shadow.__name__, shadow.__module__) == (kind.__name__, kind.__module__)
    assert inspect.signature(shadow.__call__) == inspect.signature(kind.__call__)
