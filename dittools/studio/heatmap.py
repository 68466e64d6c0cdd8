"""Where two clips differ, as colours."""

import numpy as np

from dittools.pipelines.output import Frames

SCALES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the full range; the map's brightest colour
# black, violet, red, orange, pale yellow: brightness rises all along, also without colour vision
STOPS = np.array(
    [[0.0, 0.0, 0.02], [0.33, 0.06, 0.43], [0.73, 0.22, 0.33], [0.98, 0.55, 0.04], [0.99, 1, 0.64]],
    np.float32,
)


def difference(first: Frames, second: Frames) -> tuple[Frames, float]:
    """Return the heat map [F, H, W, 3] of two clips, and the difference its last colour stands for.

    The difference is the largest over the colour channels; the scale is the smallest of SCALES that
    covers all but one pixel in a thousand.
    """
    apart = np.abs(first - second).max(axis=-1)
    most = float(np.quantile(apart, 0.999))
    scale = next((s for s in SCALES if s >= most), SCALES[-1])
    place = np.clip(apart / scale, 0, 1) * (len(STOPS) - 1)
    low = np.minimum(place.astype(int), len(STOPS) - 2)
    rest = (place - low)[..., None]
    colours: Frames = (STOPS[low] * (1 - rest) + STOPS[low + 1] * rest).astype(np.float32)
    return colours, scale
