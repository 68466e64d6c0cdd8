"""Does a clip show what its prompt asked for? A deterministic checker for the demo world.

It needs no model: pixels are sorted by nearest known colour, the object is the largest patch of
object colour, its centre is tracked over the frames and its outline compared with each shape.
"""

from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from dittools.metrics.scene import (
    BACKGROUND_COLOURS,
    MOTIONS,
    OBJECT_COLOURS,
    SHAPES,
    STRIPE_GAINS,
    parse,
)

Frames = NDArray[np.floating]
Mask = NDArray[np.bool_]

LEAST_OBJECT = 0.015  # of a frame's area; smaller patches are specks
LEAST_TRAVEL = 0.20  # of the frame's side, from first to last frame
LEAST_OVERLAP = 0.72  # intersection over union with the best shape
LEAST_LEAD = 0.03  # of the best shape's overlap over the next
LEAST_CONTRAST = 0.15  # spread of brightness over its mean, from which a background is striped
TRIANGLE_AREA = 3 * 3**0.5  # of an upright equilateral triangle with inner radius 1


@dataclass(frozen=True)
class Seen:
    """What a clip shows; None where nothing can be told."""

    background: str | None
    texture: str | None
    colour: str | None
    shape: str | None
    motion: str | None
    objects: int  # in the median frame


@dataclass(frozen=True)
class PromptScore:
    """Which of the things a prompt asks for a clip shows; None where it does not ask."""

    background: bool | None
    texture: bool | None
    colour: bool | None
    shape: bool | None
    motion: bool | None
    objects: int  # found in the median frame

    @property
    def all(self) -> bool:
        """True when nothing asked for is wrong, and one object is there if any was asked for."""
        asked = [getattr(self, field.name) for field in fields(self)[:-1]]
        wants_object = any(value is not None for value in asked[2:])
        return False not in asked and (self.objects == 1 or not wants_object)

    def to_dict(self) -> dict[str, bool | int | None]:
        """Return the fields and `all` as JSON types."""
        return {**asdict(self), "all": self.all}


def score_clip(frames: Frames, prompt: str) -> PromptScore:
    """Compare a clip with its prompt.

    Args:
        frames: [F, H, W, 3], RGB in 0..1.
        prompt: words of the demo world; others are ignored.
    Raises:
        ValueError: frames are not [F, H, W, 3] with at least one frame.
    """
    seen, wanted = observe(frames), parse(prompt)

    def verdict(name: str) -> bool | None:
        want = getattr(wanted, name)
        return None if want is None else bool(getattr(seen, name) == want)

    return PromptScore(
        background=verdict("background"),
        texture=verdict("texture"),
        colour=verdict("colour"),
        shape=verdict("shape"),
        motion=verdict("motion"),
        objects=seen.objects,
    )


def prompt_margins(frames: Frames, prompt: str) -> dict[str, float]:
    """Say by how much a clip shows each thing its prompt asks for, 0 to 1; "all" is their mean.

    `score_clip` says yes or no, and so the same of many clips; these numbers come from the same
    pixels and tell clips apart that all pass, or all fail.

    Args:
        frames: [F, H, W, 3], RGB in 0..1.
        prompt: words of the demo world; others are ignored.
    Returns:
        background: share of the background's pixels in its colour; texture: contrast, 0.5 where
        striped begins; colour: share of the object pixels in its colour; shape: overlap of the
        largest patch of that colour with the shape, 0 in frames without one; motion: travel the
        right way less that across it, of twice the least that counts; objects: 1 over their number.
    """
    wanted = parse(prompt)
    objects, grounds = _sort_pixels(frames)
    found: dict[str, float] = {}
    if wanted.background is not None:
        own = grounds == list(BACKGROUND_COLOURS).index(wanted.background)
        found["background"] = float(own.sum() / max((grounds >= 0).sum(), 1))
    if wanted.texture is not None:
        striped = min(_contrast(frames, grounds) / (2 * LEAST_CONTRAST), 1.0)
        found["texture"] = striped if wanted.texture == "striped" else 1.0 - striped
    if wanted.colour is None and wanted.shape is None and wanted.motion is None:
        return {**found, "all": float(np.mean(list(found.values()))) if found else 0.0}
    colours = list(OBJECT_COLOURS)
    counts = [int((objects == i).sum()) for i in range(len(colours))]
    best = int(np.argmax(counts)) if wanted.colour is None else colours.index(wanted.colour)
    if wanted.colour is not None:
        found["colour"] = counts[best] / max(sum(counts), 1)
    least = LEAST_OBJECT * frames.shape[1] * frames.shape[2]
    patches = [[p for p in frame if p.sum() >= least] for frame in _patches(objects == best)]
    largest = {f: max(frame, key=np.sum) for f, frame in enumerate(patches) if frame}
    if wanted.shape is not None:
        place = SHAPES.index(wanted.shape)
        overlaps = [float(_overlaps(mask)[place]) for mask in largest.values()]
        found["shape"] = sum(overlaps) / len(frames)
    if wanted.motion is not None:
        x, y = _travel(largest) if len(largest) > 1 else (0.0, 0.0)
        way = MOTIONS[wanted.motion]
        along, across = way[0] * x + way[1] * y, abs(way[0] * y + way[1] * x)
        share = len(largest) / len(frames)
        found["motion"] = share * min(max((along - across) / (2 * LEAST_TRAVEL), 0.0), 1.0)
    number = float(np.median([len(frame) for frame in patches]))
    found["objects"] = 1 / number if number >= 1 else 0.0
    return {**found, "all": float(np.mean(list(found.values())))}


def observe(frames: Frames) -> Seen:
    """Say what a clip [F, H, W, 3] in 0..1 shows.

    Raises:
        ValueError: frames are not [F, H, W, 3] with at least one frame.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: expected [F, H, W, 3], at least one frame, got {frames.shape}")
    objects, grounds = _sort_pixels(frames)
    counts = [int((objects == i).sum()) for i in range(len(OBJECT_COLOURS))]
    best = int(np.argmax(counts))
    patches = _patches(objects == best)
    area = frames.shape[1] * frames.shape[2]
    found = [[patch for patch in frame if patch.sum() >= LEAST_OBJECT * area] for frame in patches]
    largest = {f: max(frame, key=np.sum) for f, frame in enumerate(found) if frame}
    tracked = 2 * len(largest) >= len(frames)
    return Seen(
        background=_ground_colour(grounds),
        texture=_texture(frames, grounds),
        colour=list(OBJECT_COLOURS)[best] if tracked else None,
        shape=_shape(list(largest.values())) if tracked else None,
        motion=_motion(largest) if tracked else None,
        objects=int(np.median([len(frame) for frame in found])),
    )


def _sort_pixels(frames: Frames) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return each pixel's object and background colour number [F, H, W], -1 where it is not one."""
    grounds = np.array(list(BACKGROUND_COLOURS.values()))
    shades = [gain * grounds for gain in (1.0, *STRIPE_GAINS)]
    palette = np.concatenate([np.array(list(OBJECT_COLOURS.values())), *shades])
    # Squared distance less the pixel's own square, which is the same for every colour.
    distance = (palette**2).sum(1) - 2 * frames.astype(np.float64) @ palette.T
    nearest = distance.argmin(-1)
    bright = len(OBJECT_COLOURS)
    objects = np.where(nearest < bright, nearest, -1)
    return objects, np.where(nearest < bright, -1, (nearest - bright) % len(grounds))


def _ground_colour(grounds: NDArray[np.intp]) -> str | None:
    counts = [int((grounds == i).sum()) for i in range(len(BACKGROUND_COLOURS))]
    return list(BACKGROUND_COLOURS)[int(np.argmax(counts))] if any(counts) else None


def _texture(frames: Frames, grounds: NDArray[np.intp]) -> str | None:
    if not (grounds >= 0).any():
        return None
    return "striped" if _contrast(frames, grounds) > LEAST_CONTRAST else "plain"


def _contrast(frames: Frames, grounds: NDArray[np.intp]) -> float:
    """Return spread over mean of the brightness of the background, 0 without one."""
    counts = [int((grounds == i).sum()) for i in range(len(BACKGROUND_COLOURS))]
    brightness = frames.sum(-1)[grounds == int(np.argmax(counts))]
    if brightness.size == 0:
        return 0.0
    return float(brightness.std() / max(float(brightness.mean()), 1e-6))


def _patches(mask: Mask) -> list[list[Mask]]:
    """Return the 4-connected patches of each frame of [F, H, W]."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # until neither rows nor columns join anything
        spread = _level_runs(_level_runs(label).swapaxes(1, 2)).swapaxes(1, 2)
        if np.array_equal(spread, label):
            break
        label = spread
    return [[frame == i for i in np.unique(frame) if i] for frame in label]


def _level_runs(label: NDArray[np.intp]) -> NDArray[np.intp]:
    """Give every unbroken run along the last axis the largest label in it; 0 is no label."""
    inside = label > 0
    first = inside & ~np.pad(inside, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    run = np.cumsum(first).reshape(label.shape)[inside]
    largest = np.zeros(int(first.sum()) + 1, dtype=label.dtype)
    np.maximum.at(largest, run, label[inside])
    levelled = np.zeros_like(label)
    levelled[inside] = largest[run]
    return levelled


def _centre(mask: Mask) -> tuple[float, float]:
    """Return the centroid (x, y) in pixels."""
    y, x = np.nonzero(mask)
    return float(x.mean()), float(y.mean())


def _motion(tracked: dict[int, Mask]) -> str | None:
    """Return the direction of the least-squares path; None when still or oblique."""
    if len(tracked) < 2:
        return None
    travel = _travel(tracked)
    main = int(np.argmax(np.abs(travel)))
    if abs(travel[main]) < LEAST_TRAVEL or abs(travel[1 - main]) > 0.5 * abs(travel[main]):
        return None
    step = [0, 0]
    step[main] = 1 if travel[main] > 0 else -1
    return next(name for name, way in MOTIONS.items() if way == tuple(step))


def _travel(tracked: dict[int, Mask]) -> NDArray[np.float64]:
    """Return (x, y) from first to last frame along the least-squares path, as shares of a side."""
    time = np.array(list(tracked), dtype=np.float64)
    height, width = next(iter(tracked.values())).shape
    centres = np.array([_centre(mask) for mask in tracked.values()]) / (width, height)
    slope = np.polyfit(time, centres, 1)[0]
    travel: NDArray[np.float64] = slope * (time.max() - time.min())
    return travel


def _shape(masks: list[Mask]) -> str | None:
    """Return the shape that overlaps best, averaged over frames; None when unclear.

    Frames in which the frame's edge cuts the object are left out, unless all do.
    """
    whole = [m for m in masks if not (m[[0, -1]].any() or m[:, [0, -1]].any())]
    overlap = np.mean([_overlaps(mask) for mask in whole or masks], axis=0)
    order = np.argsort(overlap)[::-1]
    clear = overlap[order[0]] - overlap[order[1]] >= LEAST_LEAD
    return SHAPES[int(order[0])] if clear and overlap[order[0]] >= LEAST_OVERLAP else None


def _overlaps(mask: Mask) -> NDArray[np.float64]:
    """Return intersection over union with each of SHAPES at the mask's centroid and area."""
    centre_x, centre_y = _centre(mask)
    area = float(mask.sum())
    y, x = np.indices(mask.shape, dtype=np.float64)
    x, y = x - centre_x, y - centre_y
    slant = (3**0.5 / 2) * np.abs(x) - 0.5 * y
    ideals = {
        "circle": x * x + y * y <= area / np.pi,
        "square": np.maximum(np.abs(x), np.abs(y)) <= area**0.5 / 2,
        "triangle": np.maximum(slant, y) <= (area / TRIANGLE_AREA) ** 0.5,
    }
    return np.array([(mask & ideals[s]).sum() / (mask | ideals[s]).sum() for s in SHAPES])
