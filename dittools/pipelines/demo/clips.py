"""Draws the captioned clips the demo model learns from.

Everything is a formula of a seed: signed-distance shapes, straight paths, stripes. Sizes and
positions are shares of the frame; y points down.
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import torch

from dittools.metrics.scene import (
    BACKGROUND_COLOURS,
    MOTIONS,
    OBJECT_COLOURS,
    SHAPES,
    STRIPE_GAINS,
    TEXTURES,
    Scene,
    caption,
)

SIZE = 96  # pixels per side
FRAMES = 12
STRIPES = 4.0  # light and dark pairs across the frame
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def held_out_scenes() -> list[Scene]:
    """Return 64 scenes whose 16 looks (all but motion) are never drawn in training."""
    colours, grounds = list(OBJECT_COLOURS), list(BACKGROUND_COLOURS)
    return [
        Scene(
            colour=colours[c],
            shape=SHAPES[(c + r) % 3],
            motion=motion,
            background=grounds[(c + 2 * r) % 5],
            texture=TEXTURES[(c + r // 2) % 2],
        )
        for r, c in product(range(4), range(4))
        for motion in MOTIONS
    ]


def training_looks() -> list[Scene]:
    """Return every look (a scene without its motion) that training may draw."""
    banned = {replace(scene, motion=None) for scene in held_out_scenes()}
    every = product(OBJECT_COLOURS, SHAPES, BACKGROUND_COLOURS, TEXTURES)
    looks = [Scene(c, s, None, b, t) for c, s, b, t in every]
    return [look for look in looks if look not in banned]


def training_caption(scene: Scene, rng: Random) -> str:
    """Return one way to ask for a scene: 75 % in full, 15 % in part, 10 % empty."""
    kind = rng.random()
    if kind < 0.10:
        return ""
    if kind < 0.25:
        keep = [rng.random() < 0.5 for _ in range(4)]
        scene = Scene(
            colour=scene.colour if keep[0] else None,
            shape=scene.shape if keep[1] else None,
            motion=scene.motion if keep[2] else None,
            background=scene.background if keep[3] else None,
            texture=scene.texture if keep[3] else None,
        )
    return _reworded(caption(scene), scene, rng)


def _reworded(text: str, scene: Scene, rng: Random) -> str:
    """Vary what people vary: "plain" said or not, adjective order, "gray", articles."""
    ground = scene.background or ""
    if scene.texture == "plain" and rng.random() < 0.3:
        both = f"plain {ground}" if rng.random() < 0.5 else f"{ground} plain"
        text = text.replace(f"{ground} background", f"{both} background")
    elif scene.texture == "striped" and rng.random() < 0.25:
        text = text.replace(f"{ground} striped", f"striped {ground}")
    if rng.random() < 0.15:
        text = text.replace("grey", "gray")
    if rng.random() < 0.1:
        text = text.replace("a ", "")
    return text


@dataclass(frozen=True)
class Clip:
    """A scene with every free number fixed."""

    scene: Scene
    radius: float
    centre: tuple[float, float]  # (x, y) half-way along the path
    path: float  # length of the path
    phase: float  # of the stripes, in stripe pairs


def random_clip(scene: Scene, rng: Random) -> Clip:
    """Fix the free numbers of a full scene."""
    return Clip(
        scene=scene,
        radius=rng.uniform(0.20, 0.25),
        centre=(rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55)),
        path=rng.uniform(0.50, 0.58),
        phase=rng.random(),
    )


def draw(clips: list[Clip], frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels [B, F, 3, SIZE, SIZE] in 0..1 and the object's cover [B, F, SIZE, SIZE].

    Args:
        clips: what to draw.
        frames: [B, F] frame numbers in 0..FRAMES - 1; clips need not share them.
    """
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    progress = frames / (FRAMES - 1) - 0.5
    step = torch.tensor([MOTIONS[c.scene.motion or "left"] for c in clips], dtype=torch.float32)
    middle = torch.tensor([c.centre for c in clips])
    path = torch.tensor([c.path for c in clips])
    position = middle[:, None] + (progress * path[:, None])[..., None] * step[:, None]  # [B, F, 2]
    x = axis.view(1, 1, 1, SIZE) - position[..., 0, None, None]
    y = axis.view(1, 1, SIZE, 1) - position[..., 1, None, None]
    distance = torch.stack([_distance(c, x[i], y[i]) for i, c in enumerate(clips)])
    cover = (0.5 - distance * SIZE).clamp(0, 1)
    ground = torch.stack([_background(c, axis) for c in clips])[:, None, :, None]  # rows are alike
    colour = torch.tensor([OBJECT_COLOURS[c.scene.colour or "red"] for c in clips])
    pixels = torch.lerp(
        ground.expand(-1, progress.shape[1], -1, SIZE, -1),
        colour[:, None, :, None, None],
        cover[:, :, None],
    )
    return pixels, cover


def _distance(clip: Clip, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the signed distance to the outline, negative inside, broadcast over x and y."""
    if clip.scene.shape == "circle":
        return (x * x + y * y).sqrt() - clip.radius
    if clip.scene.shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.89 * clip.radius  # equal area
    inner = 0.68 * clip.radius  # of an upright triangle; its area is 0.76 of the circle's
    side = (math.sqrt(3) / 2) * x.abs() - 0.5 * y
    return torch.maximum(side, y) - inner


def _background(clip: Clip, axis: torch.Tensor) -> torch.Tensor:
    """Return one row of background, [3, SIZE]; vertical stripes make every row the same."""
    colour = torch.tensor(BACKGROUND_COLOURS[clip.scene.background or "grey"])[:, None]
    if clip.scene.texture != "striped":
        return colour.expand(3, SIZE)
    wave = torch.sin(2 * math.pi * (STRIPES * axis + clip.phase))
    sharp = (0.5 + wave * 2.0).clamp(0, 1)  # an edge about two pixels wide
    return colour * torch.lerp(torch.tensor(STRIPE_GAINS[0]), torch.tensor(STRIPE_GAINS[1]), sharp)
