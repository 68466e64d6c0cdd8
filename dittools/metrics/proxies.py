"""Weight-free stand-ins for the quality dimensions whose definition needs a downloaded network.

They follow the same rule as the true dimension with a simpler estimator inside, and their numbers
are comparable only with each other. Every caller marks them "proxy".
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dittools.errors import InputError
from dittools.metrics.clips import Pixels, opencv

Features = npt.NDArray[np.float64]  # [frames, features]

LEAST_FLOW_SIDE = 16  # pixels; the flow estimator works on patches of 8 at a quarter of the size
SAMPLED_FRAMES = 16  # of a clip, for the imaging measure


def colour_histogram(pixels: Pixels, bins: int = 6) -> Features:
    """Return one soft joint RGB histogram per frame: what is there, not where.

    Each pixel is shared over the eight nearest of bins**3 colours, so that a small change of shade
    is a small change of the histogram.
    """
    rows = []
    for frame in _small(pixels, 64):
        place = frame.reshape(-1, 3) / 255 * (bins - 1)
        low = np.minimum(place.astype(np.intp), bins - 2)
        part = place - low
        histogram = np.zeros(bins**3)
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, part, 1 - part), axis=1)
            cell = low + np.array(corner)
            index = (cell[:, 0] * bins + cell[:, 1]) * bins + cell[:, 2]
            histogram += np.bincount(index, weight, bins**3)
        rows.append(histogram / len(place))
    return np.stack(rows)


def colour_layout(pixels: Pixels, cells: int = 8) -> Features:
    """Return the mean colours of a cells x cells raster per frame, about mid-grey: what is where.

    One constant feature keeps the direction of an all-grey frame defined.
    """
    cv2 = opencv()
    rows = []
    for frame in pixels:
        grid = cv2.resize(frame, (cells, cells), interpolation=cv2.INTER_AREA).astype(np.float64)
        layout = (grid / 255 - 0.5).reshape(-1)
        rows.append(np.append(layout, 0.25 * np.sqrt(layout.size)))
    return np.stack(rows)


def flow(first: Pixels, second: Pixels) -> npt.NDArray[np.float32]:
    """Return the optical flow [H, W, 2] in pixels (x, y) from one frame to the next.

    Source: DIS, Kroeger et al. 2016 (arXiv:1603.03590), OpenCV's medium preset.
    """
    cv2 = opencv()
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in (first, second)]
    return np.asarray(estimator.calc(grey[0], grey[1], None), np.float32)


def largest_motion(pixels: Pixels) -> list[float]:
    """Return, per pair of consecutive frames, the mean length of the largest 5 % of its flow."""
    _check_flow_size(pixels)
    found = []
    for first, second in pairwise(pixels):
        length = np.sort(np.hypot(*np.moveaxis(flow(first, second), -1, 0)), axis=None)[::-1]
        found.append(float(length[: max(1, int(length.size * 0.05))].mean()))
    return found


def middle_frame(first: Pixels, second: Pixels) -> Pixels:
    """Return the frame half-way between two, both moved half their flow and averaged."""
    _check_flow_size(first[None])
    half = [_moved(first, flow(first, second)), _moved(second, flow(second, first))]
    middle: Pixels = (np.mean(half, axis=0) + 0.5).astype(np.uint8)
    return middle


def imaging(pixels: Pixels) -> dict[str, float]:
    """Return sharpness, cleanness and evenness in 0..1, and their geometric mean "score".

    - sharpness: 1 less the blur of Crete et al. 2007 (scikit-image's blur_effect).
    - cleanness: 1 / (1 + sigma / 10), sigma the noise of Immerkaer 1996 on the 0..255 scale.
    - evenness: 1 / blockiness; blockiness is the mean step over the borders of 8-pixel blocks over
      the one over their middles, never below 1. Enlarging by 2 or 4 leaves it as it is.
    """
    from skimage.measure import blur_effect

    cv2 = opencv()
    chosen = np.unique(np.linspace(0, len(pixels) - 1, SAMPLED_FRAMES).round().astype(int))
    parts = []
    for frame in pixels[chosen]:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64)
        blur = 1.0 if np.ptp(grey) == 0 else float(blur_effect(grey / 255))
        parts.append((1 - blur, 1 / (1 + _noise(grey, cv2) / 10), 1 / _blockiness(grey)))
    sharpness, cleanness, evenness = (float(v) for v in np.mean(parts, axis=0))
    return {
        "score": float(np.cbrt(sharpness * cleanness * evenness)),
        "sharpness": sharpness,
        "cleanness": cleanness,
        "evenness": evenness,
    }


def _small(pixels: Pixels, side: int) -> list[Pixels]:
    cv2 = opencv()
    height, width = pixels.shape[1:3]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in pixels]


def _moved(frame: Pixels, whole: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    cv2 = opencv()
    y, x = np.mgrid[0 : frame.shape[0], 0 : frame.shape[1]].astype(np.float32)
    at_x, at_y = x - whole[..., 0] / 2, y - whole[..., 1] / 2
    moved = cv2.remap(frame, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.float32)


def _check_flow_size(pixels: Pixels) -> None:
    if min(pixels.shape[1:3]) < LEAST_FLOW_SIDE:
        raise InputError(
            "frames are too small for optical flow",
            expected=f"sides of {LEAST_FLOW_SIDE} pixels or more",
            got=f"{pixels.shape[2]} x {pixels.shape[1]}",
        )


def _noise(grey: npt.NDArray[np.float64], cv2: Any) -> float:
    """Return the standard deviation of fine noise: a mask that planes and edges pass as zero."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)
    response = cv2.filter2D(grey, cv2.CV_64F, kernel)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(response).mean()) if response.size else 0.0


def _blockiness(grey: npt.NDArray[np.float64]) -> float:
    ratios = []
    for axis in (0, 1):
        step = np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis)
        border, middle = step[7::8], step[3::8]
        if border.size:
            ratios.append((border.mean() + 1) / (middle.mean() + 1))  # +1: flat frames stay at 1
    return max(1.0, float(np.mean(ratios))) if ratios else 1.0
