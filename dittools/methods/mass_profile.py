"""How few keys hold most of the attention of a head: the offline profile of SVOO.

Source: arXiv:2603.18636. Heads keep their place in it over steps and prompts, so that floors
measured once serve (`least_kept` of `clustered`, one per head).
"""

import torch

_CHUNK = 2**23  # scores sorted at a time


def mass_density(
    query: torch.Tensor, key: torch.Tensor, scale: float, *, mass: float = 0.95, rows: int = 4096
) -> torch.Tensor:
    """Return float64 [H]: the least share of keys that holds `mass`, mean over queries.

    Args:
        query: [S, H, D].
        key: [S_k, H, D].
        scale: factor on the scores.
        mass: share of a query's attention.
        rows: queries looked at, evenly spaced; all if there are no more.
    """
    picked = torch.linspace(0, len(query) - 1, min(rows, len(query)), device=query.device)
    some = query.index_select(0, picked.round().long()).transpose(0, 1).float() * scale
    turned = key.permute(1, 2, 0).float()
    heads, count, _ = some.shape
    total = torch.zeros(heads, dtype=torch.float64, device=query.device)
    step = max(1, _CHUNK // (heads * key.shape[0]))
    for part in some.split(step, dim=1):
        weights = (part @ turned).softmax(-1).sort(dim=-1, descending=True).values
        short = weights.cumsum(-1, dtype=torch.float64) < mass - 1e-6
        total += (short.sum(-1) + 1).clamp(max=key.shape[0]).double().sum(1)
    return total / (count * key.shape[0])


def floors(profile: torch.Tensor, low: float, high: float) -> tuple[float, ...]:
    """Return one floor per head from a profile [H], or the largest of several [n, H], in bounds."""
    largest = profile if profile.dim() == 1 else profile.amax(0)
    return tuple(round(x, 4) for x in largest.clamp(low, high).tolist())
