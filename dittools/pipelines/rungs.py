"""The rungs of a high-resolution run: enlarge, add noise, run the last part of the schedule."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dittools.errors import InputError
from dittools.methods.clear_weights import load_clear
from dittools.patches import Report, attach
from dittools.patches.attach import Target
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import Frames
from dittools.pipelines.tail import (
    Step,
    add_noise,
    enlarged,
    fresh_noise,
    scout,
    standing_in,
    tail_of,
    told,
)

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Enlarged:
    """What `highres` made.

    Attributes:
        image: [height, width, 3] in 0..1.
        rungs: the images of all stages at their own sizes, the base image first.
        reports: what each rung's attention did.
        report: sizes, schedule, densities and seconds, as JSON types.
    """

    image: Frames
    rungs: list[Frames]
    reports: list[Report]
    report: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How every rung runs; the defaults are the authors'.

    Attributes:
        steps: of the whole schedule.
        strength: share of it that runs, in (0, 1].
        guidance: distilled guidance of the rungs.
        ntk_factor: on the base of the rotary embedding.
        shift: of the schedule, None for the constant one of the scheduler's config; either way the
            shift does not grow with the image.
        growth: most that a side grows from one rung to the next; None goes there at once.
        tiling: whether the codec works in tiles.
    """

    steps: int = 20
    strength: float = 0.7
    guidance: float | None = 7.5
    ntk_factor: float = 10.0
    shift: float | None = None
    growth: float | None = 2.0
    tiling: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        wanted = (
            ("steps", type(self.steps) is int and self.steps > 0, "a whole number of at least 1"),
            ("strength", is_number(self.strength) and 0 < self.strength <= 1, "in (0, 1]"),
            ("ntk_factor", is_number(self.ntk_factor) and self.ntk_factor > 0, "above 0"),
            (
                "growth",
                self.growth is None or (is_number(self.growth) and self.growth > 1),
                "above 1, or None for a single rung",
            ),
        )
        for name, is_good, expected in wanted:
            if not is_good:
                got = repr(getattr(self, name))
                raise InputError(f"{name} is not usable", expected=expected, got=got)


def ladder(
    native: tuple[int, int], wanted: tuple[int, int], growth: float | None
) -> list[tuple[int, int]]:
    """Return the sizes of the rungs, the wanted one last: equal factors of at most `growth`.

    Args:
        native: (height, width) of the base image.
        wanted: (height, width) of the result.
        growth: above 1; None for one rung.
    """
    ratio = max(wanted[0] / native[0], wanted[1] / native[1])
    count = 1
    if growth is not None:
        count = max(1, math.ceil(math.log(ratio) / math.log(growth) - 1e-6))
    sizes = [
        tuple(round(a * (b / a) ** (rung / count)) for a, b in zip(native, wanted, strict=True))
        for rung in range(1, count)
    ]
    return [*((tall, wide) for tall, wide in sizes), wanted]


@dataclass(frozen=True)
class Climb:
    """One request, checked."""

    pipe: Any
    target: Target
    recipe: Recipe
    plan: Any
    weights: Weights | None
    unit: int  # pixels that every side is padded to a multiple of
    backend: str
    arguments: dict[str, Any]

    def run(
        self,
        base: Settings,
        image: Frames | None,
        wanted: tuple[int, int],
        generator: torch.Generator | None,
        note: Callable[[str], None],
        progress: Step | None,
    ) -> Enlarged:
        """Return the image; see `highres`."""
        native = (base.height or 0, base.width or 0)
        sizes = ladder(native, wanted, self.recipe.growth)
        extra = dict(self.arguments)
        if generator is not None:
            extra["generator"] = generator
        twin, first = self._begin(base, sizes[-1])
        rungs, rows, reports, seconds = [], [], [], 0.0
        if image is None:
            made = generate(self.pipe, base, told(progress, "base image"), extra)
            image, seconds = made.frames[0], made.seconds
        rungs.append(image)
        with ExitStack() as undo:
            self._prepare(undo)
            for number, size in enumerate(sizes):
                grown = f"{size[0]}x{size[1]}"
                note(f"rung {number + 1} of {len(sizes)}: {grown} pixels")
                noisy = self._noisy(image, size, twin, base.seed + number, generator)
                settings, told_of = self._settings(base, size), told(progress, grown)
                with standing_in(self.pipe, twin), self._attached() as handle:
                    made = generate(self.pipe, settings, told_of, {**extra, "latents": noisy})
                    reports.append(handle.report())
                image = made.frames[0, : size[0], : size[1]]
                rungs.append(image)
                rows.append(self._row(size, first, made.seconds, reports[-1]))
        report = {
            "format": "dittools-highres",
            "settings": base.to_dict(),
            "native": [*rungs[0].shape[:2]],
            "target": list(wanted),
            "recipe": asdict(self.recipe),
            "base_seconds": seconds,
            "rungs": rows,
        }
        return Enlarged(image, rungs, reports, report)

    def _begin(self, base: Settings, size: tuple[int, int]) -> tuple[Any, int]:
        """Return the schedule of all rungs, set, and its first step.

        Starting the last rung sets it, and refuses now what would be refused then; the constant
        shift makes it the same for every size.
        """
        scheduler, recipe = self.pipe.scheduler, self.recipe
        shift = scheduler.config.get("shift", 1.0) if recipe.shift is None else recipe.shift
        twin, first = tail_of(scheduler, recipe.steps, recipe.strength, shift, round_up=True)
        with standing_in(self.pipe, twin), self._attached():
            scout(self.pipe, [self.target], self._settings(base, size), self.arguments)
        return twin, first

    def _prepare(self, undo: ExitStack) -> None:
        """Put weights, rotary base and codec tiles in place for the rungs."""
        undo.enter_context(stretched(self.target.denoiser, self.recipe.ntk_factor))
        if self.recipe.tiling:
            undo.enter_context(tiled(self.pipe.vae))
        if self.weights is not None:
            undo.callback(load_clear(self.target.denoiser, self.weights).unload)

    def _noisy(
        self,
        image: Frames,
        size: tuple[int, int],
        schedule: Any,
        seed: int,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Return packed latents of an image at one more size, as noisy as the first step wants."""
        clean = encode(self.pipe, enlarged(image[None], size, self._padded(size), bicubic=True))
        noise = fresh_noise(clean, seed, generator)
        return pack(self.pipe, add_noise(schedule, clean, noise))

    def _row(
        self, size: tuple[int, int], first: int, seconds: float, found: Report
    ) -> dict[str, Any]:
        """Return what one rung did, as JSON types."""
        tall, wide = self._padded(size)
        return {
            "size": list(size),
            "padded": [tall, wide],
            "tokens": tall * wide // token(self.pipe) ** 2,
            "first_step": first,
            "steps": self.recipe.steps - first,
            "density": found.density,
            "seconds": seconds,
            "attention": found.to_dict(),
        }

    def _attached(self) -> Any:
        return attach(self.pipe, self.plan, backend=self.backend)

    def _settings(self, base: Settings, size: tuple[int, int]) -> Settings:
        tall, wide = self._padded(size)
        guidance = self.recipe.guidance
        return replace(base, steps=self.recipe.steps, height=tall, width=wide, guidance=guidance)

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        tall, wide = (-(-side // self.unit) * self.unit for side in size)
        return tall, wide


def token(pipe: Any) -> int:
    """Return the pixels along a side of a token: the codec's and the packing by two."""
    return 2 * int(pipe.vae_scale_factor)


def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the most likely latents [1, C, h, w] of one image, normalised as Flux's are."""
    vae = pipe.vae
    with torch.no_grad():
        flat = pixels[:, :, 0].to(pipe._execution_device, vae.dtype)
        latents: torch.Tensor = vae.encode(flat).latent_dist.mode().float()
    if not bool(latents.isfinite().all()):
        raise InputError("the encoder returned NaN or infinity", remedy="a VAE in float32")
    clean: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return clean


def pack(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as tokens of two by two, as `pipe(latents=...)` takes them."""
    packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


@contextmanager
def stretched(denoiser: Any, factor: float) -> Iterator[None]:
    """Multiply the base of the rotary embedding for a while."""
    embedding: Any = getattr(denoiser, "pos_embed", None)
    if not is_number(getattr(embedding, "theta", None)):
        raise InputError(
            f"{type(denoiser).__name__} has no rotary base to stretch", remedy="ntk_factor of 1"
        )
    stock = embedding.theta
    embedding.theta = stock * factor
    try:
        yield
    finally:
        embedding.theta = stock


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Let the codec work in tiles for a while."""
    before = vae.use_tiling
    vae.use_tiling = True
    try:
        yield
    finally:
        vae.use_tiling = before


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
