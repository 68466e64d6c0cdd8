"""Round tensors to few-bit integers in groups and back, to see what quantised attention would lose.

Source: the symmetric scheme of arXiv:2506.16054: scale = largest magnitude / (2**(bits - 1) - 1).
"""

import torch


def fake_quant(tensor: torch.Tensor, bits: int, rows: int, columns: int) -> torch.Tensor:
    """Return [..., R, C] rounded to `bits` in groups of rows x columns, ragged at the ends.

    Args:
        tensor: any float.
        bits: 2 to 16; the values used are -(2**(bits-1) - 1) to 2**(bits-1) - 1.
        rows: rows per group.
        columns: columns per group, 0 for whole rows.
    """
    height, width = tensor.shape[-2:]
    columns = columns or width
    pad = (0, -width % columns, 0, -height % rows)
    groups = torch.nn.functional.pad(tensor, pad)
    groups = groups.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    levels = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(dim=(-3, -1), keepdim=True) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded: torch.Tensor = (groups / scale).round().clamp(-levels, levels) * scale
    whole: torch.Tensor = rounded.flatten(-2).flatten(-3, -2)
    return whole[..., :height, :width]
