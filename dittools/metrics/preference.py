"""Scores of one clip for one prompt, from weights the user names: CLIP, PickScore, aesthetics ...

Nothing is downloaded; the embedded model's own checker needs no weights. Images of a clip are
scored at up to four evenly spaced frames and averaged.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dittools.errors import InputError
from dittools.metrics.embedders import load_aesthetic_head, load_embedder, prepared
from dittools.metrics.prompt_score import Frames, prompt_margins, score_clip

FRAMES = 4  # of a clip
Score = Callable[[Frames, str], float]
KINDS: tuple[str, ...] = (
    "demo",
    "demo-pass",
    "clip=FOLDER",
    "pickscore=FOLDER",
    "aesthetic=FOLDER",
)
KINDS += ("imagereward=FILE", "package.module:function")


@dataclass(frozen=True)
class Scorer:
    """A judge of clips.

    Attributes:
        name: for reports.
        mark: changes when its verdicts may, so that kept results are not mixed up.
        score: (frames [F, H, W, 3] in 0..1, prompt) -> more is better.
    """

    name: str
    mark: str
    score: Score

    def __call__(self, frames: Frames, prompt: str) -> float:
        """Return the score of one clip."""
        return float(self.score(frames, prompt))


def named_scorer(wanted: "str | Scorer | Score") -> Scorer:
    """Return the scorer of a name, or one around a function.

    Args:
        wanted: "demo" (by how much a clip of the embedded model shows what was asked for),
            "demo-pass" (1 when it shows all), "clip=FOLDER" (100 x cosine), "pickscore=FOLDER",
            "aesthetic=FOLDER" (LAION, a CLIP folder that also holds the linear weights),
            "imagereward=FILE", "package.module:function", a Scorer, or a function.
    Raises:
        InputError: no such scorer, or its weights cannot be loaded.
    """
    if isinstance(wanted, Scorer):
        return wanted
    if callable(wanted):
        return _around(wanted, getattr(wanted, "__qualname__", type(wanted).__name__))
    if wanted == "demo":
        return Scorer(
            "demo", "demo 1", lambda frames, prompt: prompt_margins(frames, prompt)["all"]
        )
    if wanted == "demo-pass":
        return Scorer("demo-pass", "demo-pass 1", lambda f, p: float(score_clip(f, p).all))
    kind, equals, place = wanted.partition("=")
    makers = {
        "clip": _clip,
        "pickscore": _pickscore,
        "aesthetic": _aesthetic,
        "imagereward": _imagereward,
    }
    if equals and kind in makers:
        path = Path(place).expanduser()
        if not path.exists():
            raise InputError(f"no {kind} weights", expected="an existing folder or file", got=place)
        return Scorer(kind, f"{wanted} {_weights_mark(path)}", makers[kind](path))
    if ":" in wanted and not equals:
        return _around(_imported(wanted), wanted)
    raise InputError("unknown scorer", expected=", ".join(KINDS), got=repr(wanted))


def _around(function: Score, name: str) -> Scorer:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # built in, or typed at a prompt: its name has to do
        text = name
    return Scorer(name, f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}", function)


def _imported(name: str) -> Score:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"cannot import the scorer {name}", got=str(error), remedy="module:function on the path"
        ) from error
    if not callable(function):
        raise InputError(f"{name} is no function", got=type(function).__name__)
    found: Score = function
    return found


def _weights_mark(path: Path) -> str:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _pixels(frames: Frames) -> Any:
    """Return uint8 [up to 4, H, W, 3], evenly spaced."""
    count = min(FRAMES, len(frames))
    places = [(2 * i + 1) * len(frames) // (2 * count) for i in range(count)]
    return (np.clip(np.asarray(frames)[places], 0, 1) * 255).round().astype(np.uint8)


def _cosines(folder: Path) -> tuple[Callable[[Any, str], torch.Tensor], float]:
    """Return (pixels, prompt) -> cosines [N] of a CLIP model, and its logit scale."""
    import transformers

    try:
        model: Any = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files fail in many ways, all one message
        raise InputError(
            f"cannot load CLIP with its text side and tokenizer from {folder}",
            expected="a transformers folder of a CLIPModel",
            got=" ".join(str(error).split())[:200],
        ) from error
    scale = float(model.logit_scale.exp())
    longest = int(model.config.text_config.max_position_embeddings)

    def cosines(pixels: Any, prompt: str) -> torch.Tensor:
        tokens = tokenizer(
            prompt, return_tensors="pt", truncation=True, max_length=longest, padding=True
        )
        with torch.no_grad():
            found = model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=prepared(pixels, "clip", antialias=True),
            )
        logits: torch.Tensor = found.logits_per_image[:, 0].float()
        return logits / scale

    return cosines, scale


def _clip(folder: Path) -> Score:
    """100 x cosine, negative ones as 0 (Hessel et al. 2021, arXiv:2104.08718, with weight 100)."""
    cosines, _ = _cosines(folder)
    return lambda f, p: float(100 * cosines(_pixels(f), p).clamp(min=0).mean())


def _pickscore(folder: Path) -> Score:
    """Logit of the fine-tuned CLIP-H (Kirstain et al. 2023, arXiv:2305.01569)."""
    cosines, scale = _cosines(folder)
    return lambda f, p: float(scale * cosines(_pixels(f), p).mean())


def _aesthetic(folder: Path) -> Score:
    embed = load_embedder(folder, "clip", antialias=True)
    width = embed(np.zeros((1, 8, 8, 3), np.uint8)).shape[1]
    head = load_aesthetic_head(folder, width)
    return lambda f, _: 10 * head(embed(_pixels(f)))


def _imagereward(path: Path) -> Score:
    """The package of Xu et al. 2023 (arXiv:2304.05977), which the user installs."""
    try:
        package: Any = importlib.import_module("ImageReward")
    except ImportError as error:
        raise InputError(
            "ImageReward is not installed", remedy="pip install image-reward", got=str(error)
        ) from error
    from PIL import Image

    model = package.load(str(path))

    def score(frames: Frames, prompt: str) -> float:
        images = [Image.fromarray(image) for image in _pixels(frames)]
        return float(np.mean([model.score(prompt, image) for image in images]))

    return score
