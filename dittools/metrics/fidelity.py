"""How far an accelerated clip is from the dense one of the same seed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from dittools.errors import InputError
from dittools.metrics.clips import check_frames

Frames = npt.NDArray[np.float32]  # [frames, height, width, 3], 0..1

PSNR_CAP_DB = 120.0  # identical clips; keeps tables and JSON finite
CHUNK_PIXELS = 4_000_000  # frames are compared a few at a time, so that long clips fit in memory
EXACT_PIXELS = 500_000  # of a clip; SSIM of longer ones runs in float32, 15 times as fast
MS_SSIM_LEAST_SIDE = 176  # pixels: window 11 on the smallest of five scales, a sixteenth


def db_words(psnr_db: float) -> str:
    """Return a PSNR in words: "identical" at the cap, a millionth of the range apart or less."""
    return "identical" if psnr_db >= PSNR_CAP_DB else f"{psnr_db:.1f} dB"


@dataclass(frozen=True)
class Fidelity:
    """Distance of one clip to another.

    Attributes:
        psnr_db: over all pixels of the clip, capped at 120 for identical clips.
        ssim: mean over frames, 1 for identical ones.
        frame_psnr_db: per frame.
        frame_ssim: per frame.
        ms_ssim: mean over frames; None where a side is shorter than 176 pixels.
    """

    psnr_db: float
    ssim: float
    frame_psnr_db: tuple[float, ...]
    frame_ssim: tuple[float, ...] = ()
    ms_ssim: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON types."""
        return asdict(self)


def compare(reference: Frames, other: Frames) -> Fidelity:
    """Return PSNR, SSIM and MS-SSIM of a clip against a reference.

    SSIM is torchmetrics' (Gaussian window 11, sigma 1.5, the constants of Wang et al. 2004); frames
    smaller than the window use the largest odd window that fits. MS-SSIM is theirs too, with the
    five weights of Wang et al. 2003. Clips above half a million pixels are filtered in float32,
    which moves SSIM by up to 1e-4.

    Args:
        reference: [F, H, W, 3] in 0..1.
        other: the same shape.
    Raises:
        InputError: shapes differ, a clip is empty, or a value is not finite.
    """
    if reference.shape != other.shape or reference.ndim != 4 or 0 in reference.shape:
        raise InputError(
            "clips cannot be compared",
            expected="two clips [frames, height, width, 3] of one shape",
            got=f"{reference.shape} and {other.shape}",
        )
    check_frames(reference, "the first clip")
    check_frames(other, "the second clip")
    squares = _frame_errors(reference, other)
    frame_ssim = _per_frame(reference, other, _ssim)
    large = min(reference.shape[1:3]) >= MS_SSIM_LEAST_SIDE
    return Fidelity(
        _psnr(float(np.mean(squares))),
        float(np.mean(frame_ssim)),
        tuple(_psnr(value) for value in squares),
        frame_ssim,
        float(np.mean(_per_frame(reference, other, _ms_ssim))) if large else None,
    )


def frame_psnr(reference: Frames, other: Frames) -> tuple[float, ...]:
    """Return the PSNR of each frame in dB, capped at 120; for clips already known to fit."""
    return tuple(_psnr(value) for value in _frame_errors(reference, other))


def _frame_errors(reference: Frames, other: Frames) -> tuple[float, ...]:
    return tuple(
        float(np.square(first.astype(np.float64) - second.astype(np.float64)).mean())
        for first, second in zip(reference, other, strict=True)
    )


def worst_second(frame_psnr_db: tuple[float, ...] | list[float], fps: float) -> tuple[int, int]:
    """Return first and last frame (inclusive) of the second with the lowest mean PSNR."""
    length = min(len(frame_psnr_db), max(1, round(fps)))
    sums = np.convolve(np.asarray(frame_psnr_db, np.float64), np.ones(length), "valid")
    first = int(np.argmin(sums))
    return first, first + length - 1


def _psnr(mean_square: float) -> float:
    return (
        PSNR_CAP_DB
        if mean_square <= 1e-12
        else min(-10 * float(np.log10(mean_square)), PSNR_CAP_DB)
    )


def _per_frame(
    reference: Frames,
    other: Frames,
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[float, ...]:
    """Apply a measure of [F, 3, H, W] pairs to a few frames at a time."""
    exact = reference[..., 0].size <= EXACT_PIXELS
    count = max(1, CHUNK_PIXELS // (reference.shape[1] * reference.shape[2]))
    values: list[float] = []
    for start in range(0, len(reference), count):
        first, second = (
            torch.from_numpy(np.ascontiguousarray(clip[start : start + count]))
            .permute(0, 3, 1, 2)
            .to(torch.float64 if exact else torch.float32)
            for clip in (reference, other)
        )
        values += measure(first, second).flatten().tolist()
    return tuple(values)


def _ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(first.shape[2:])
    window = min(11, side - 1 + side % 2)
    value = structural_similarity_index_measure(
        first,
        second,
        data_range=1.0,
        gaussian_kernel=window == 11,
        kernel_size=window,
        reduction="none",
    )
    assert isinstance(value, torch.Tensor)
    return value


def _ms_ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as measure,
    )

    value = measure(first, second, data_range=1.0, reduction="none", normalize="relu")
    assert isinstance(value, torch.Tensor)
    return value
