"""The seven video-quality dimensions of VBench, with its definitions.

Source: VBench, arXiv:2311.17982, and the package `vbench` 0.1.5. Temporal flickering needs no
network and is VBench's own number. Subject consistency (DINO), background consistency (CLIP) and
aesthetic quality (CLIP and a linear head) are VBench's definition when the user names a folder of
weights. Where a network is absent a weight-free stand-in is computed and marked "proxy", and so is
a network of another size, such as DINOv2; a proxy and a true value never share a column.
Difference: VBench's static-clip filter before temporal flickering is left to the user, as in its
custom_input mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dittools.errors import InputError
from dittools.metrics import proxies
from dittools.metrics.clips import Clip
from dittools.metrics.embedders import CLIP_TYPES, Embedder, load_aesthetic_head, load_embedder

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
# what VBench loads: its name; hidden width, patch side and layers; how its config calls it
NETWORKS = {
    "dino": ("DINO ViT-B/16", (768, 16, 12), ("vit",)),
    "clip": ("CLIP ViT-B/32", (768, 32, 12), CLIP_TYPES),
    "aesthetic": ("CLIP ViT-L/14", (1024, 14, 24), CLIP_TYPES),
}
Features = npt.NDArray[np.float64]
NO_PAIR = "needs two frames or more"


@dataclass(frozen=True)
class Weights:
    """Folders of networks the user has; None where there is none.

    Attributes:
        dino: transformers folder, VBench uses DINO ViT-B/16.
        clip: transformers folder, VBench uses CLIP ViT-B/32.
        aesthetic: transformers folder of CLIP ViT-L/14 that also holds LAION's linear head.
    """

    dino: Path | None = None
    clip: Path | None = None
    aesthetic: Path | None = None


@dataclass(frozen=True)
class Dimension:
    """One dimension over all clips.

    Attributes:
        name: as VBench calls it.
        kind: "vbench" (its definition), "proxy" (a stand-in) or "not measured".
        how: what was computed, or why nothing was.
        value: aggregated as VBench aggregates; None when not measured.
        clips: file name -> value, None where one clip cannot be measured.
        parts: file name -> named components, where there are any.
    """

    name: str
    kind: str
    how: str
    value: float | None
    clips: dict[str, float | None]
    parts: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON types."""
        return asdict(self)


Measure = Callable[[Clip], "float | dict[str, float] | None"]


class Quality:
    """Measures clips one at a time, so that a folder never has to fit in memory."""

    def __init__(self, weights: Weights | None = None) -> None:
        """Load the networks, once, before any clip is read.

        Raises:
            InputError: a weights folder is missing or holds the wrong files.
        """
        given = weights or Weights()
        self._rules: dict[str, tuple[str, str, Measure | None]] = {
            "subject_consistency": _consistency(given.dino, "dino"),
            "background_consistency": _consistency(given.clip, "clip"),
            "temporal_flickering": ("vbench", "1 - mean |frame difference| / 255", _flickering),
            "motion_smoothness": (
                "proxy",
                "every second frame rebuilt by DIS optical flow (VBench: AMT)",
                _smoothness,
            ),
            "dynamic_degree": ("proxy", "DIS optical flow (VBench: RAFT)", _dynamic),
            "aesthetic_quality": _aesthetic(given.aesthetic),
            "imaging_quality": (
                "proxy",
                "sharpness, noise and blockiness (VBench: MUSIQ)",
                lambda clip: proxies.imaging(clip.pixels),
            ),
        }
        self._found: dict[str, dict[str, float | None]] = {name: {} for name in DIMENSIONS}
        self._parts: dict[str, dict[str, dict[str, float]]] = {name: {} for name in DIMENSIONS}
        self._pairs: dict[str, int] = {}  # file name -> frames less one

    def add(self, clip: Clip) -> dict[str, float | None]:
        """Measure one clip in every dimension and return its values.

        Raises:
            InputError: a clip of this name was measured already.
        """
        name = clip.path.name
        if name in self._pairs:
            raise InputError("two clips have one name", got=name)
        values: dict[str, float | None] = {}
        for dimension, (_, _, measure) in self._rules.items():
            found = measure(clip) if measure is not None else None
            if isinstance(found, dict):
                self._parts[dimension][name] = found
                found = found["score"]
            values[dimension] = found
        for dimension, value in values.items():
            self._found[dimension][name] = value
        self._pairs[name] = len(clip.pixels) - 1
        return values

    def result(self) -> dict[str, Dimension]:
        """Return every dimension over the clips added so far."""
        return {
            name: self._dimension(name, kind, how) for name, (kind, how, _) in self._rules.items()
        }

    def _dimension(self, name: str, kind: str, how: str) -> Dimension:
        clips = self._found[name]
        known = {clip: value for clip, value in clips.items() if value is not None}
        if kind != "not measured" and not known:
            kind, how = "not measured", f"{how}: {NO_PAIR} in some clip"
        value: float | None = None
        if known:
            # VBench averages the two consistencies over frames, everything else over clips
            pooled = name in ("subject_consistency", "background_consistency")
            weights = [self._pairs[clip] if pooled else 1 for clip in known]
            value = float(np.average(list(known.values()), weights=weights))
        return Dimension(name, kind, how, value, dict(clips), dict(self._parts[name]))


def measure_clips(clips: Sequence[Clip], weights: Weights | None = None) -> dict[str, Dimension]:
    """Return the seven dimensions of some clips already in memory."""
    quality = Quality(weights)
    for clip in clips:
        quality.add(clip)
    return quality.result()


def consistency(features: Features) -> float:
    """Return the mean similarity of each frame to the one before and to the first.

    Args:
        features: [frames, D]; two frames or more.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(length, 1e-12)
    before = np.maximum(0.0, (unit[1:] * unit[:-1]).sum(1))
    first = np.maximum(0.0, unit[1:] @ unit[0])
    return float(np.mean((before + first) / 2))


def temporal_flickering(frames: npt.NDArray[np.uint8]) -> float:
    """Return (255 - mean absolute difference of consecutive frames) / 255, on the 0..255 scale."""
    steps = [
        np.abs(second.astype(np.int16) - first).mean(dtype=np.float64)
        for first, second in pairwise(frames)
    ]
    return (255.0 - float(np.mean(steps))) / 255.0


def motion_smoothness(frames: npt.NDArray[np.uint8]) -> float:
    """Return (255 - MAE) / 255 of the odd frames against ones rebuilt from their neighbours."""
    errors = [
        np.abs(
            proxies.middle_frame(frames[i - 1], frames[i + 1]).astype(np.int16) - frames[i]
        ).mean(dtype=np.float64)
        for i in range(1, len(frames) - 1, 2)
    ]
    return (255.0 - float(np.mean(errors))) / 255.0


def dynamic_degree(frames: npt.NDArray[np.uint8], fps: float) -> bool:
    """Whether enough of the motion is fast: VBench's rule on about 8 frames per second.

    A pair counts when the largest 5 % of its flow is above 6 pixels at a side of 256; a quarter of
    the frames must count. Difference: at least one pair must, also in clips of two frames.
    """
    seen = frames[:: max(1, round(fps / 8))]
    threshold = 6.0 * min(frames.shape[1:3]) / 256
    least = max(1, round(4 * len(seen) / 16))
    fast = [motion > threshold for motion in proxies.largest_motion(seen)]
    return bool(sum(fast) >= least)


def _consistency(folder: Path | None, family: str) -> tuple[str, str, Measure]:
    if folder is not None:
        embedder: Embedder = load_embedder(folder, family)
        (kind, how), features = _named(embedder, family), embedder.__call__
    elif family == "dino":
        kind, how = "proxy", "colour histogram (VBench: DINO ViT-B/16)"
        features = proxies.colour_histogram
    else:
        kind, how = "proxy", "colour layout, 8 x 8 cells (VBench: CLIP ViT-B/32)"
        features = proxies.colour_layout

    def measure(clip: Clip) -> float | None:
        return consistency(features(clip.pixels)) if len(clip.pixels) > 1 else None

    return kind, how, measure


def _flickering(clip: Clip) -> float | None:
    return temporal_flickering(clip.pixels) if len(clip.pixels) > 1 else None


def _smoothness(clip: Clip) -> float | None:
    return motion_smoothness(clip.pixels) if len(clip.pixels) > 2 else None


def _dynamic(clip: Clip) -> float | None:
    return float(dynamic_degree(clip.pixels, clip.fps)) if len(clip.pixels) > 1 else None


def _aesthetic(folder: Path | None) -> tuple[str, str, Measure | None]:
    if folder is None:
        reason = "no weight-free stand-in is honest; name a folder of CLIP ViT-L/14 and the head"
        return "not measured", reason, None
    embedder = load_embedder(folder, "clip")
    width = embedder(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]
    head = load_aesthetic_head(folder, width)
    kind, how = _named(embedder, "aesthetic")
    return kind, f"{how} and its linear head", lambda c: head(embedder(c.pixels))


def _named(embedder: Embedder, use: str) -> tuple[str, str]:
    """Return the kind and name of a dimension whose network the user named."""
    name, size, types = NETWORKS[use]
    if embedder.size == size and embedder.name.startswith(tuple(f"{t}," for t in types)):
        return "vbench", embedder.name
    return "proxy", f"{embedder.name} (VBench: {name})"
