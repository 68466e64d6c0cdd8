"""Scores the demo model: 64 held-out prompt and seed pairs, dense sampling, the shipped checker."""

from dataclasses import dataclass
from typing import Any

import torch

from dittools.metrics.prompt_score import PromptScore, score_clip
from dittools.metrics.scene import MOTIONS, caption
from dittools.pipelines.demo import DEMO_DEFAULTS, frames_argument
from dittools.pipelines.demo.clips import held_out_scenes

FIRST_SEED = 1000
REQUIRED = {"background": 0.98, "colour": 0.98, "shape": 0.90, "motion": 0.90}
REQUIRED_DIRECTION = 0.80


@dataclass(frozen=True)
class Pair:
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int
    motion: str


def held_out_pairs() -> list[Pair]:
    """Return the 64 pairs; no training clip ever had the looks they ask for."""
    return [
        Pair(caption(scene), FIRST_SEED + i, scene.motion or "")
        for i, scene in enumerate(held_out_scenes())
    ]


@dataclass(frozen=True)
class ScoreTable:
    """Shares of clips that show what was asked."""

    pairs: int
    shares: dict[str, float]  # by attribute, "all" last
    directions: dict[str, float]  # share with the right motion, by the motion asked for

    @property
    def met(self) -> bool:
        """True when every requirement is."""
        enough = all(self.shares[name] >= least for name, least in REQUIRED.items())
        return enough and min(self.directions.values()) >= REQUIRED_DIRECTION

    def __str__(self) -> str:
        """Return two lines of percentages."""
        lines = [f"{self.pairs} held-out pairs: {_percent(self.shares)}"]
        return "\n".join([*lines, f"motion by direction: {_percent(self.directions)}"])


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def generate_pairs(pipe: Any, pairs: list[Pair], batch: int = 4) -> list[torch.Tensor]:
    """Return one clip [F, H, W, 3] in 0..1 for each pair; batching does not change the noise."""
    clips: list[torch.Tensor] = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        output = pipe(
            prompt=[pair.prompt for pair in part],
            height=DEMO_DEFAULTS["height"],
            width=DEMO_DEFAULTS["width"],
            num_frames=frames_argument(DEMO_DEFAULTS["frames"]),
            num_inference_steps=DEMO_DEFAULTS["steps"],
            guidance_scale=DEMO_DEFAULTS["guidance"],
            generator=[torch.Generator().manual_seed(pair.seed) for pair in part],
            output_type="pt",
        )
        clips += list(output.frames.permute(0, 1, 3, 4, 2).float().cpu())
    return clips


def tabulate(pairs: list[Pair], scores: list[PromptScore]) -> ScoreTable:
    """Return the shares of scored clips."""
    names = ("background", "texture", "colour", "shape", "motion", "all")
    shares = {
        name: sum(bool(getattr(score, name)) for score in scores) / len(scores) for name in names
    }
    directions = {}
    for motion in MOTIONS:
        hits = [bool(s.motion) for s, p in zip(scores, pairs, strict=True) if p.motion == motion]
        directions[motion] = sum(hits) / max(1, len(hits))
    return ScoreTable(len(pairs), shares, directions)


def score_pipeline(pipe: Any, pairs: list[Pair] | None = None) -> ScoreTable:
    """Generate and score pairs, all 64 by default; takes minutes on two cores."""
    pairs = held_out_pairs() if pairs is None else pairs
    clips = generate_pairs(pipe, pairs)
    scores = [
        score_clip(clip.numpy(), pair.prompt) for clip, pair in zip(clips, pairs, strict=True)
    ]
    return tabulate(pairs, scores)
