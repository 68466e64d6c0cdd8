"""Training-free acceleration of diffusers image and video transformers.

`attach` wraps a stock pipeline in one call; `attention` and `block_sparse_attention` work on plain
tensors. Importing this package needs torch alone; diffusers and the rest load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dittools import pipelines as pipelines
    from dittools.call import AttentionCall as AttentionCall
    from dittools.errors import AttachError as AttachError
    from dittools.errors import DitToolsError as DitToolsError
    from dittools.errors import InputError as InputError
    from dittools.errors import PlanError as PlanError
    from dittools.errors import UnknownMethod as UnknownMethod
    from dittools.errors import UnsupportedCall as UnsupportedCall
    from dittools.functional import attention as attention
    from dittools.functional import block_sparse_attention as block_sparse_attention
    from dittools.grid import TokenGrid as TokenGrid
    from dittools.mask import BlockMask as BlockMask
    from dittools.methods import METHODS as METHODS
    from dittools.methods.headhunter import HeadHunter as HeadHunter
    from dittools.order import TokenOrder as TokenOrder
    from dittools.patches import Attachment as Attachment
    from dittools.patches import Recorder as Recorder
    from dittools.patches import Report as Report
    from dittools.patches import attach as attach
    from dittools.patches import detach as detach
    from dittools.plans import Plan as Plan
    from dittools.searching.api import SearchResult as SearchResult
    from dittools.searching.api import search as search
    from dittools.searching.calibrate_paro import calibrate as calibrate
    from dittools.searching.forecast import Forecast as Forecast
    from dittools.searching.forecast import forecast as forecast

# public name -> module that holds it
_HOMES = {
    "AttachError": "dittools.errors",
    "Attachment": "dittools.patches",
    "AttentionCall": "dittools.call",
    "BlockMask": "dittools.mask",
    "DitToolsError": "dittools.errors",
    "Forecast": "dittools.searching.forecast",
    "HeadHunter": "dittools.methods.headhunter",
    "InputError": "dittools.errors",
    "METHODS": "dittools.methods",
    "Plan": "dittools.plans",
    "PlanError": "dittools.errors",
    "Recorder": "dittools.patches",
    "Report": "dittools.patches",
    "SearchResult": "dittools.searching.api",
    "TokenGrid": "dittools.grid",
    "TokenOrder": "dittools.order",
    "UnknownMethod": "dittools.errors",
    "UnsupportedCall": "dittools.errors",
    "attach": "dittools.patches",
    "attention": "dittools.functional",
    "block_sparse_attention": "dittools.functional",
    "calibrate": "dittools.searching.calibrate_paro",
    "detach": "dittools.patches",
    "forecast": "dittools.searching.forecast",
    "pipelines": "",
    "search": "dittools.searching.api",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use; method classes (`dittools.Radial`) come from METHODS."""
    if name in _HOMES:
        home = _HOMES[name]
        return getattr(import_module(home), name) if home else import_module(f"dittools.{name}")
    if name[:1].isupper():
        for method in import_module("dittools.methods").METHODS.values():
            if method.__name__ == name:
                return method
    raise AttributeError(f"module 'dittools' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted({*globals(), *__all__})
