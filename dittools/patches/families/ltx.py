"""LTX-Video and LTX-2: video tokens only in `attn1`; LTX-2's other sites stay stock."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read the latent sizes from the keywords; patches of 1 in every release.

    Appended condition tokens do not fit the grid, so such calls stay dense.
    """
    sizes = [int(argument(arguments, name)) for name in ("num_frames", "height", "width")]
    return Layout((TokenGrid(*sizes),))


LTX = register_family(
    Family("ltx", ("LTXVideoTransformer3DModel",), (r"transformer_blocks\.\d+\.attn1",), layout)
)
LTX2 = register_family(
    Family("ltx2", ("LTX2VideoTransformer3DModel",), (r"transformer_blocks\.\d+\.attn1",), layout)
)
