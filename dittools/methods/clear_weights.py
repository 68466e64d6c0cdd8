"""Load the published CLEAR weights into a FLUX transformer, and take them out again.

Source: Huage001/CLEAR. The files overwrite the image-side attention projections of all blocks, and
the down-sampled variants add one weight per cell position and block. Any module tree with the same
parameter names works; diffusers is not imported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from dittools.errors import InputError

_TRAINED = re.compile(r"transformer_blocks\.\d+\.attn\.to_(q|k|v)\.(weight|bias)$")
_TRAINED_OUT = re.compile(r"(?<!single_)transformer_blocks\.\d+\.attn\.to_out\.0\.(weight|bias)$")
_SPATIAL = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.attn\.processor\.spatial_weight$")


@dataclass
class ClearWeights:
    """What was loaded, and what `unload` puts back.

    Attributes:
        spatial: cell weights in raster order, one entry per block in execution order; each is
            the `spatial_weights` of the Clear method on that layer. Empty for local files.
    """

    spatial: list[tuple[float, ...]]
    _module: nn.Module
    _saved: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)

    def unload(self) -> None:
        """Put the original parameters back; a second call does nothing."""
        with torch.no_grad():
            own = dict(self._module.named_parameters())
            for name, tensor in self._saved.items():
                own[name].copy_(tensor)
        self._saved.clear()


def trained_names(module: nn.Module) -> list[str]:
    """Return what a CLEAR file holds: to_q, to_k, to_v of all blocks, to_out of double ones."""
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if _TRAINED.search(name) or _TRAINED_OUT.search(name)]


def load_clear(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> ClearWeights:
    """Copy a CLEAR state dict into a transformer and return the handle that undoes it.

    Raises:
        InputError: a key is missing, unexpected or of another shape; nothing has changed then.
    """
    spatial = {name: t for name, t in weights.items() if _SPATIAL.search(name)}
    given = {name: t for name, t in weights.items() if name not in spatial}
    own, wanted = dict(module.named_parameters()), set(trained_names(module))
    unexpected, missing = sorted(set(given) - wanted), sorted(wanted - set(given))
    if unexpected or missing or not wanted:
        raise InputError(
            "these are not CLEAR weights for this transformer",
            expected=f"exactly its {len(wanted)} image-side attention parameters",
            got=f"{len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})",
            remedy="load a FLUX.1 transformer and a clear_*.safetensors file",
        )
    wrong = [name for name in given if given[name].shape != own[name].shape]
    if wrong:
        raise InputError(
            f"CLEAR weight {wrong[0]} has another shape",
            expected=str(tuple(own[wrong[0]].shape)),
            got=str(tuple(given[wrong[0]].shape)),
        )
    handle = ClearWeights(spatial_weights(spatial), module)
    with torch.no_grad():
        for name, tensor in given.items():
            handle._saved[name] = own[name].detach().clone()
            own[name].copy_(tensor)
    return handle


def spatial_weights(weights: Mapping[str, torch.Tensor]) -> list[tuple[float, ...]]:
    """Return the cell weights of a state dict by execution, double-stream blocks first; [] if none.

    Each is in raster order, the `spatial_weights` of the Clear method on that layer.
    """
    places = [
        (found[1].startswith("single"), int(found[2]), name)
        for name in weights
        if (found := _SPATIAL.search(name))
    ]
    return [tuple(weights[name].flatten().tolist()) for _, _, name in sorted(places)]
