"""Trains the demo model from nothing on drawn clips: `python -m dittools.pipelines.demo.train`.

Four stages, each on the weights of the one before. Single frames teach colours and shapes. First
frames teach where a motion starts: over whole clips a direction says nothing about place or time
alone, only about both at once, and gradient descent hardly finds such a three-way rule from
nothing. The two end frames and two between then teach where it goes, and whole clips consistency.
A run can be stopped at any time and goes on from its last checkpoint.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from dittools.metrics.scene import MOTIONS
from dittools.pipelines.demo import codec as codec_module
from dittools.pipelines.demo import flow, load_demo, model
from dittools.pipelines.demo.clips import (
    FRAMES,
    OPPOSITE,
    Clip,
    draw,
    random_clip,
    training_caption,
    training_looks,
)
from dittools.pipelines.demo.pack import stored_bytes, write_pipeline
from dittools.pipelines.demo.score import ScoreTable, score_pipeline
from dittools.reading import parse_json, read_tensors

log = logging.getLogger(__name__)

EMA_DECAY = 0.998
GOLDEN = 0.6180339887498949  # steps of this size cover 0..1 evenly
MARK_WEIGHT = 0.5  # loss weight of the mark channels


@dataclass(frozen=True)
class Stage:
    """One stage of the schedule."""

    name: str
    frames: int  # frames per clip
    batch: int  # clips; even, since clips come in pairs of opposite motion
    steps: int
    lr: tuple[float, float]  # at the first and last step
    shifts: tuple[float, float]  # of the noise levels, for every other pair; larger is noisier
    object_weight: float  # extra loss weight of tokens the object covers
    last: int = FRAMES - 1  # latest frame a single frame is drawn from


SCHEDULE = (
    Stage("image", 1, 32, 1300, (2.5e-3, 2.2e-3), (2.0, 25.0), 2.0),
    Stage("start", 1, 32, 500, (2.2e-3, 2.2e-3), (6.0, 30.0), 4.0, last=1),
    Stage("ends", 4, 8, 1000, (2.0e-3, 1.6e-3), (4.0, 30.0), 3.0),
    Stage("clip", FRAMES, 4, 700, (1.5e-3, 0.0), (3.0, 20.0), 1.5),
)


@dataclass
class Batch:
    """What one training step sees."""

    clean: torch.Tensor  # [B, C, F, h, w]
    noise: torch.Tensor  # like clean
    sigma: torch.Tensor  # [B]
    captions: list[str]
    frames: torch.Tensor  # [F], for the rotary angles
    weight: torch.Tensor  # [B, 1, F, h, w]


class Learner(torch.nn.Module):
    """The two networks trained together."""

    def __init__(self) -> None:
        """Start from fresh weights, drawn from torch's global generator."""
        super().__init__()
        self.transformer = model.build_transformer()
        self.text_encoder = model.build_text_encoder()
        model.aim_at_words(self.transformer, self.text_encoder)


def make_batch(stage: Stage, codec: codec_module.Codec, step: int, seed: int) -> Batch:
    """Draw the batch of a step; the same seed and step always give the same batch.

    A pair shares everything but its direction, noise included: what differs is the caption's doing.
    """
    rng = Random(f"{seed}/{stage.name}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    looks, motions = training_looks(), list(MOTIONS)
    clips: list[Clip] = []
    captions: list[str] = []
    for _ in range(stage.batch // 2):
        first = random_clip(replace(rng.choice(looks), motion=rng.choice(motions)), rng)
        turned = replace(first.scene, motion=OPPOSITE[first.scene.motion or "left"])
        pair = [first, replace(first, scene=turned)]
        wording = rng.random()
        clips += pair
        captions += [training_caption(clip.scene, Random(wording)) for clip in pair]
    pairs = stage.batch // 2
    numbers = _frame_numbers(stage, pairs, rng).repeat_interleave(2, 0)
    pixels, cover = draw(clips, numbers)
    clean = codec.encode(pixels, numbers)
    noise = torch.randn(clean[::2].shape, generator=generator).repeat_interleave(2, 0)
    spread = (torch.arange(pairs) + (step * GOLDEN) % 1) / pairs
    # What a clip shows is settled while it is almost pure noise, so half the pairs are drawn there.
    shift = torch.tensor(stage.shifts)[(torch.arange(pairs) + step) % 2]
    sigma = (shift * spread / (1 + (shift - 1) * spread)).repeat_interleave(2, 0)
    blocks = cover.unflatten(3, (-1, codec_module.PATCH)).unflatten(2, (-1, codec_module.PATCH))
    weight = 1 + stage.object_weight * blocks.mean((3, 5))[:, None]
    return Batch(clean, noise, sigma, captions, numbers[0], weight)


def _frame_numbers(stage: Stage, pairs: int, rng: Random) -> torch.Tensor:
    """Return [pairs, F]; only single frames differ between pairs, as time is relative there."""
    if stage.frames == 1:
        return torch.tensor([[rng.randint(0, stage.last)] for _ in range(pairs)])
    middle = sorted(rng.sample(range(1, FRAMES - 1), stage.frames - 2))
    return torch.tensor([[0, *middle, FRAMES - 1]]).expand(pairs, -1)


def flow_loss(prediction: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted loss and, for the log, the plain picture and mark errors [2]."""
    error = (prediction - (batch.noise - batch.clean)).square()
    picture, marks = error.split([codec_module.COMPONENTS, codec_module.MARKS], dim=1)
    weighted = (picture * batch.weight).mean() / batch.weight.mean()
    share = codec_module.COMPONENTS / codec_module.CHANNELS
    loss = share * weighted + (1 - share) * MARK_WEIGHT * marks.mean()
    return loss, torch.stack([picture.mean(), marks.mean()]).detach()


def optimisers(learner: Learner) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else."""
    matrices = [p for p in learner.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in learner.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class Run:
    """A training run and what it keeps on disk in `folder`."""

    def __init__(self, folder: Path, seed: int = 0, compiled: bool = True) -> None:
        """Start afresh, or where the checkpoint in `folder` left off."""
        torch.manual_seed(seed)
        self.folder, self.seed = folder, seed
        self.codec = codec_module.fit()
        self.tokenizer = model.build_tokenizer()
        self.learner = Learner()
        self.average = {name: p.detach().clone() for name, p in self.learner.named_parameters()}
        self.done: dict[str, int] = {}  # steps per stage
        self.block = torch.compile(flow.run_block, dynamic=False) if compiled else None
        folder.mkdir(parents=True, exist_ok=True)
        self._restore()

    def train(self, stage: Stage, save_every: int = 100) -> None:
        """Run what is left of one stage."""
        optims = optimisers(self.learner)
        started, smooth = time.monotonic(), torch.zeros(2)
        first = self.done.get(stage.name, 0)
        for step in range(first, stage.steps):
            warm = min(1.0, (step - first + 1) / 40)
            share = step / max(1, stage.steps - 1)
            lr = warm * (stage.lr[0] + (stage.lr[1] - stage.lr[0]) * share)
            errors = self._step(stage, step, optims, lr)
            smooth = errors if step == first else torch.lerp(smooth, errors, 0.03)
            self.done[stage.name] = step + 1
            if (step + 1) % 50 == 0:
                pace = (time.monotonic() - started) / (step + 1 - first)
                picture, marks = smooth.tolist()
                log.info(
                    "%s %d/%d picture %.3f marks %.3f, %.2f s a step",
                    *(stage.name, step + 1, stage.steps, picture, marks, pace),
                )
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                self.save()

    def _step(
        self, stage: Stage, step: int, optims: list[torch.optim.Optimizer], lr: float
    ) -> torch.Tensor:
        batch = make_batch(stage, self.codec, step, self.seed)
        sigma = batch.sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * batch.clean + sigma * batch.noise
        transformer = self.learner.transformer
        text = flow.encode_captions(self.tokenizer, self.learner.text_encoder, batch.captions)
        angles = flow.rotary(transformer, batch.frames, *noisy.shape[3:])
        with torch.autocast("cpu", torch.bfloat16):
            prediction = flow.velocity(transformer, noisy, batch.sigma, text, angles, self.block)
        loss, errors = flow_loss(prediction, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = lr
            optim.step()
            optim.zero_grad(set_to_none=True)
        self._follow()
        return errors

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights, quickly at first."""
        count = sum(self.done.values())
        decay = min(EMA_DECAY, (1 + count) / (10 + count))
        live = [p.detach() for p in self.learner.parameters()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    def averaged(self) -> Learner:
        """Return a copy of the networks that holds the averaged weights."""
        copy = Learner().eval()
        copy.load_state_dict(self.average, strict=False)
        return copy

    def save(self) -> None:
        """Write a checkpoint; a crash half-way leaves the one before."""
        live = {f"live.{name}": p.detach() for name, p in self.learner.named_parameters()}
        tensors = live | {f"average.{name}": p for name, p in self.average.items()}
        scratch = self.folder / "checkpoint.part"
        save_file(tensors, scratch, metadata={"done": json.dumps(self.done)})
        scratch.replace(self.folder / "checkpoint.safetensors")

    def _restore(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        tensors, notes = read_tensors(path)
        live = {k.removeprefix("live."): v for k, v in tensors.items() if k.startswith("live.")}
        self.learner.load_state_dict(live, strict=False)
        self.average = {name: tensors[f"average.{name}"] for name in self.average}
        self.done = parse_json(notes["done"])


def main(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints, weights and the score.")
    ] = Path("out/demo-model"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    compiled: Annotated[
        bool, typer.Option(help="Compile the block (needs a C++ compiler).")
    ] = True,
) -> None:
    """Train the demo model from nothing, or go on from the last checkpoint in OUT, and score it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    run = Run(out, compiled=compiled)
    for stage in SCHEDULE:
        run.train(stage)
    finish(run)


def finish(run: Run) -> ScoreTable:
    """Write the averaged weights as a pipeline folder and score what was written."""
    averaged, folder = run.averaged(), run.folder / "pipeline"
    write_pipeline(folder, averaged.transformer, averaged.text_encoder, run.codec)
    log.info("wrote %s, %.1f MB; scoring 64 clips", folder, stored_bytes(folder) / 1e6)
    pipe = load_demo(folder)
    pipe.set_progress_bar_config(disable=True)
    table = score_pipeline(pipe)
    (run.folder / "score.json").write_text(json.dumps(asdict(table), indent=1) + "\n")
    for line in str(table).splitlines():
        log.info("%s", line)
    log.info("the required score is %s", "met" if table.met else "NOT met")
    return table


if __name__ == "__main__":
    typer.run(main)
