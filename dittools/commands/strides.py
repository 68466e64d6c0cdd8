"""What `dittools forecast --gna-window` prints: strides that cut no tile, with their speed-up."""

import json
import sys
from typing import Any

from rich.table import Table

from dittools.commands.terminal import console
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods.gna_simulator import Simulation, gna_simulate, perfect_strides

Sides = tuple[int, int, int]


def show_strides(
    grid: str | None, window: str, tile_q: str, tile_kv: str, text: int, as_json: bool
) -> None:
    """Print the perfectly block-sparse strides of a window, the smallest first, and stride 1.

    Args:
        grid: "frames,height,width" in tokens.
        window: per axis tokens, a share below 1, or "full", comma-separated.
        tile_q, tile_kv: "frames,height,width" of the kernel's query and key tiles.
        text: text tokens, keys of every query.
        as_json: print JSON instead of a table.
    Raises:
        InputError: a grid, window or tile that cannot be read.
    """
    if grid is None:
        raise InputError("strides are found on a grid", remedy="--grid frames,height,width")
    sides = TokenGrid(*_sides("--grid", grid), text_after=text)
    asked, tiles = _window(window), (_sides("--gna-tile-q", tile_q), _sides("--gna-tile", tile_kv))
    rows = perfect_strides(sides, asked, *tiles)
    found = {
        "grid": list(sides.shape),
        "window": list(gna_simulate(sides, asked, (1, 1, 1), *tiles).window),
        "tiles": [list(tile) for tile in tiles],
        "stride_1": _row(gna_simulate(sides, asked, (1, 1, 1), *tiles)),
        "perfect": [_row(row) for row in rows],
    }
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    table = Table("stride", "speed-up", "mean", "FLOPs saved as", "cuts no tile")
    for row in (found["stride_1"], *found["perfect"]):  # type: ignore[misc]
        stride = "x".join(map(str, row["stride"]))
        numbers = [f"{row[name]:.2f}" for name in ("speedup", "mean_speedup", "flop_speedup")]
        table.add_row(stride, *numbers, "yes" if row["perfect"] else "no")
    console.print(table)
    if not rows:
        text_line = "no stride of this window cuts no tile: try one in whole tiles"
        console.print(text_line, markup=False, highlight=False)


def _row(found: Simulation) -> dict[str, Any]:
    return {
        "stride": list(found.stride),
        "speedup": found.speedup,
        "mean_speedup": found.mean_speedup,
        "flop_speedup": found.flop_speedup,
        "perfect": found.perfect,
    }


def _sides(option: str, text: str) -> Sides:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} is not usable", expected="frames,height,width", got=repr(text))
    frames, height, width = (int(part) for part in parts)
    return frames, height, width


def _window(text: str) -> tuple[int | float | str, ...]:
    try:
        found = tuple(
            part if part == "full" else float(part) if "." in part else int(part)
            for part in (piece.strip() for piece in text.split(","))
        )
    except ValueError:
        found = ()
    if len(found) != 3 or any(not _is_side(part) for part in found):
        raise InputError(
            "--gna-window is not usable",
            expected='three of tokens, shares below 1 or "full", comma-separated',
            got=repr(text),
        )
    return found


def _is_side(part: int | float | str) -> bool:
    return part == "full" or (isinstance(part, int) and part > 0) or 0 < float(part) <= 1
