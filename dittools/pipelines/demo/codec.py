"""The demo model's linear codec: 8x8 pixel patches to 21 principal components and 3 marks.

The marks are fixed ramps over columns, rows and frames, the same in every clip. Wan attends by
relative position only, so in pure noise nothing tells left from right or first from last; the
marks give the transformer a place to write down where it is, in its first sampling steps. The
decoder ignores them. `vae.py` expresses the same maths in a stock AutoencoderKLWan.
"""

from dataclasses import dataclass
from random import Random

import torch

from dittools.metrics.scene import MOTIONS, Scene
from dittools.pipelines.demo.clips import FRAMES, SIZE, draw, random_clip, training_looks

PATCH = 8  # pixels per latent side
PATCH_VALUES = 3 * PATCH * PATCH
COMPONENTS = 21
MARKS = 3
CHANNELS = COMPONENTS + MARKS
GRID = SIZE // PATCH  # latent rows and columns
REACH = 5  # latent columns from an edge over which a mark changes
TIME_REACH = 2 * REACH  # latent frames after the first over which it changes
MARK_AMPLITUDE = 4.0  # largest mark, in normalised latents


@dataclass(frozen=True)
class Codec:
    """Principal components of drawn patches, and the scale that normalises them."""

    mean: torch.Tensor  # [192], pixels in -1..1
    basis: torch.Tensor  # [192, 21], orthonormal columns
    scale: torch.Tensor  # [21], latent units per normalised unit

    def encode(self, pixels: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Return normalised latents [B, 24, F, h, w] of pixels [B, F, 3, H, W] in 0..1.

        Args:
            pixels: drawn frames.
            frames: [B, F] frame numbers, which set the time mark.
        """
        patches = to_patches(pixels * 2 - 1)  # [B, F, h, w, 192]
        components = ((patches - self.mean) @ self.basis) / self.scale
        height, width = patches.shape[2:4]
        fixed = torch.stack([marks(row, height, width) for row in frames])
        return torch.cat([components.permute(0, 4, 1, 2, 3), fixed], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels [B, F, 3, H, W] in 0..1 of normalised latents [B, 24, F, h, w]."""
        components = latents[:, :COMPONENTS].permute(0, 2, 3, 4, 1) * self.scale
        patches = components @ self.basis.T + self.mean
        return ((from_patches(patches) + 1) / 2).clamp(0, 1)


def marks(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the normalised marks [3, F, height, width]: column, row and time ramps in -4..4."""
    parts = [_edge_ramp(width).view(1, 1, width), _edge_ramp(height).view(1, height, 1)]
    time = frames.clamp(max=TIME_REACH).view(-1, 1, 1) * (2 / TIME_REACH) - 1
    ramps = [part.expand(len(frames), height, width) for part in (*parts, time)]
    return MARK_AMPLITUDE * torch.stack(ramps)


def _edge_ramp(length: int) -> torch.Tensor:
    """Return -1..1 over a side: distance to the near edge, counted up to REACH."""
    index = torch.arange(length)
    return (index.clamp(max=REACH) - (length - 1 - index).clamp(max=REACH)) / REACH


def to_patches(pixels: torch.Tensor) -> torch.Tensor:
    """Return [B, F, h, w, 192] of [B, F, 3, H, W], in the channel order of the Wan VAE."""
    b, f, c, height, width = pixels.shape
    split = pixels.view(b, f, c, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 1, 3, 5, 2, 6, 4).flatten(4)  # colour, x within, y within


def from_patches(patches: torch.Tensor) -> torch.Tensor:
    """Undo to_patches."""
    b, f, h, w, _ = patches.shape
    split = patches.view(b, f, h, w, 3, PATCH, PATCH)
    return split.permute(0, 1, 4, 2, 6, 3, 5).reshape(b, f, 3, h * PATCH, w * PATCH)


def fit(seed: int = 0, count: int = 512) -> Codec:
    """Return the codec of `count` drawn frames."""
    rng = Random(seed)
    looks, motions = training_looks(), list(MOTIONS)
    clips = []
    for _ in range(count):
        look = rng.choice(looks)
        scene = Scene(look.colour, look.shape, rng.choice(motions), look.background, look.texture)
        clips.append(random_clip(scene, rng))
    numbers = torch.tensor([[rng.randrange(FRAMES)] for _ in range(count)])
    pixels, _ = draw(clips, numbers)
    patches = to_patches(pixels * 2 - 1).reshape(-1, PATCH_VALUES).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    basis = vectors.flip(1)[:, :COMPONENTS]
    basis = basis * basis.sum(0).sign()  # eigenvectors come with either sign
    spread = values.flip(0)[:COMPONENTS].clamp(min=1e-8).sqrt()
    # Half whitening: a normalised component keeps the square root of its spread.
    scale = spread.sqrt() * (spread.mean()).sqrt()
    return Codec(mean.float(), basis.float(), scale.float())
