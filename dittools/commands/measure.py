"""What `dittools quality` measures of each clip beyond the seven dimensions, and its report."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dittools.errors import InputError
from dittools.metrics.clips import Clip, as_float, find_clips, opencv, read_clip, same_shape
from dittools.metrics.embedders import Embedder, load_embedder, load_lpips
from dittools.metrics.fidelity import compare
from dittools.metrics.official import OFFLINE, run_official
from dittools.metrics.vbench import DIMENSIONS, Dimension

CHECKER_ROWS = 96  # pixels; the demo world is drawn at this height


class Distance:
    """Distance of each clip to the one of the same name in a reference folder."""

    def __init__(
        self, folder: Path, lpips: Path | None, dino: Path | None, clip: Path | None
    ) -> None:
        """Find the references and load the networks.

        Raises:
            InputError: a folder is missing or holds the wrong files.
        """
        self._known = {path.name: path for path in find_clips(folder)}
        self._folder = folder
        self._lpips = load_lpips(lpips) if lpips is not None else None
        self._embedders: list[Embedder] = [
            load_embedder(place, family)
            for place, family in ((dino, "dino"), (clip, "clip"))
            if place is not None
        ]

    def __call__(self, other: Clip) -> dict[str, Any]:
        """Return PSNR, SSIM, MS-SSIM and, where a network was named, LPIPS and cosines."""
        import torch

        path = self._known.get(other.path.name)
        if path is None:
            raise InputError(f"{self._folder} has no clip to compare with", got=other.path.name)
        dense = read_clip(path)
        same_shape([dense, other])
        found: dict[str, Any] = compare(as_float(dense.pixels), as_float(other.pixels)).to_dict()
        if self._lpips is not None:
            pairs = zip(dense.pixels, other.pixels, strict=True)
            each = [
                [torch.from_numpy(as_float(p)).permute(2, 0, 1)[None] for p in pair]
                for pair in pairs
            ]
            found["frame_lpips"] = [float(self._lpips(a, b)) for a, b in each]
            found["lpips"] = sum(found["frame_lpips"]) / len(found["frame_lpips"])
        for embedder in self._embedders:
            cosine = (embedder(dense.pixels) * embedder(other.pixels)).sum(1)
            found[f"frame_{embedder.family}_cosine"] = cosine.tolist()
            found[f"{embedder.family}_cosine"] = float(cosine.mean())
        return found


def prompt_score(clip: Clip, prompt: str) -> dict[str, Any] | None:
    """Return what the demo world's checker says; None for prompts of another world."""
    from dittools.metrics.prompt_score import score_clip
    from dittools.metrics.scene import Scene, parse, unknown_words

    if parse(prompt) == Scene() or unknown_words(prompt):
        return None
    cv2 = opencv()
    factor = max(1, clip.pixels.shape[1] // CHECKER_ROWS)  # clips are stored enlarged
    size = (clip.pixels.shape[2] // factor, clip.pixels.shape[1] // factor)
    small = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in clip.pixels])
    return score_clip(as_float(small), prompt).to_dict()


def official_scores(
    paths: list[Path], wanted: bool, python: Path | None, device: str
) -> dict[str, Any] | None:
    """Return what the official package says per dimension; None when it is not asked for."""
    if not wanted and python is None:
        return None
    dimensions = DIMENSIONS if python is not None else OFFLINE
    found = run_official(paths, dimensions, python=python, device=device)
    return {name: asdict(row) for name, row in found.items()}


def quality_report(
    folder: Path,
    rows: dict[str, dict[str, Any]],
    dimensions: dict[str, Dimension],
    official: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the report as JSON types."""
    from dittools.pipelines.compare import environment

    scores = [row["prompt_score"]["all"] for row in rows.values() if row["prompt_score"]]
    return {
        "format": "dittools-quality",
        "version": 1,
        "environment": environment(),
        "folder": str(folder),
        "clips": rows,
        "dimensions": {name: dimension.to_dict() for name, dimension in dimensions.items()},
        "prompt_score": sum(scores) / len(scores) if scores else None,
        "official": official,
    }
