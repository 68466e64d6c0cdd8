"""What a head looks at: small attention maps, mass in named bands, and the class it resembles."""

from functools import lru_cache

import torch

from dittools.grid import TokenGrid

MAP_SIDE = 24  # cells of a downsampled map, per axis
BANDS = ("local", "diagonal", "stripe", "frame", "row", "column", "first_frame", "text")
CLASSES = ("local", "diagonal", "stripe", "frame", "row", "column", "sink", "spread")
_ENRICHED = 2.0  # times its uniform share a band must hold to name a head
_LEAST = 0.25  # of the mass, so that a narrow band with little mass names nothing


@lru_cache(maxsize=32)
def band_keys(grid: TokenGrid, rows: tuple[int, ...]) -> torch.Tensor:
    """Return bool [bands, R, tokens]: which keys lie in each band of each query.

    local: within one step in time and a sixteenth (at least 1) of each side in space; diagonal:
    within half a frame of the query in raster order; stripe: the same place in every frame; frame,
    row, column: the query's own; first_frame; text.
    """
    place = grid.coordinates()
    query = place[list(rows)][:, None]
    frame, row, column = (place - query).abs().unbind(-1)
    text = (place[None, :, 0] < 0).expand(len(rows), -1)
    near_row = row <= max(1, grid.height // 16)
    near_column = column <= max(1, grid.width // 16)
    raster = torch.arange(grid.total)
    offset = (raster - torch.tensor(rows)[:, None]).abs()
    bands = [
        (frame <= 1) & near_row & near_column,
        offset <= grid.tokens_per_frame // 2,
        (row == 0) & (column == 0),
        frame == 0,
        row == 0,
        column == 0,
        (place[None, :, 0] == 0).expand(len(rows), -1),
    ]
    return torch.stack([*(band & ~text for band in bands), text])


def band_shares(grid: TokenGrid, rows: torch.Tensor) -> torch.Tensor:
    """Return float64 [bands]: the mass each band would hold if attention were uniform."""
    return band_keys(grid, tuple(rows.tolist())).double().mean(dim=(1, 2))


def small_map(
    weight: torch.Tensor, rows: torch.Tensor, tokens: int, side: int | None = None
) -> torch.Tensor:
    """Return [H, side, side]: attention mass between runs of queries and runs of keys.

    Args:
        weight: [H, R, N], each row sums to 1.
        rows: int64 [R], the queries of the rows.
        tokens: N.
        side: cells per axis; None for as many as there are tokens, up to MAP_SIDE.
    """
    side = side or min(MAP_SIDE, tokens)
    keys = torch.arange(tokens) * side // tokens
    by_key = weight.new_zeros((*weight.shape[:2], side)).index_add_(2, keys, weight)
    out = weight.new_zeros((weight.shape[0], side, side))
    return out.index_add_(1, rows * side // tokens, by_key)


def head_class(mass: list[float], uniform: list[float]) -> str:
    """Return the class of a head from the mass in each band, by the largest gain over uniform.

    A band counts when it holds a quarter of the mass and twice its uniform share; of two such bands
    the narrower one wins where it holds most of what the wider one holds.
    """
    best, name = 0.0, "spread"
    for band, held, share in zip(BANDS, mass, uniform, strict=True):
        if band == "text" or share <= 0 or held < _LEAST or held < _ENRICHED * share:
            continue
        gain = held * (held / share) ** 0.5
        if gain > best:
            best, name = gain, "sink" if band == "first_frame" else band
    return name
