"""How far an accelerated clip is from the dense one of the same seed."""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from dittools.errors import InputError

Frames = npt.NDArray[np.float32]  # [frames, height, width, 3], 0..1

PSNR_CAP_DB = 120.0  # identical clips; keeps tables and JSON finite


@dataclass(frozen=True)
class Fidelity:
    """Distance of one clip to another.

    Attributes:
        psnr_db: over all pixels of the clip, capped at 120 for identical clips.
        ssim: mean over frames, 1 for identical ones.
        frame_psnr_db: per frame.
    """

    psnr_db: float
    ssim: float
    frame_psnr_db: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON types."""
        return asdict(self)


def compare(reference: Frames, other: Frames) -> Fidelity:
    """Return PSNR and SSIM of a clip against a reference.

    SSIM is torchmetrics' (Gaussian window 11, sigma 1.5, the constants of Wang et al. 2004); frames
    smaller than the window use the largest odd window that fits.

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
    for name, clip in (("first", reference), ("second", other)):
        if not np.isfinite(clip).all():
            frame = int(np.argwhere(~np.isfinite(clip))[0][0])
            raise InputError(f"the {name} clip holds NaN or infinity, first in frame {frame}")
    error = np.square(reference.astype(np.float64) - other.astype(np.float64))
    per_frame = tuple(_psnr(float(value)) for value in error.mean(axis=(1, 2, 3)))
    return Fidelity(_psnr(float(error.mean())), _ssim(reference, other), per_frame)


def _psnr(mean_square: float) -> float:
    return (
        PSNR_CAP_DB
        if mean_square <= 1e-12
        else min(-10 * float(np.log10(mean_square)), PSNR_CAP_DB)
    )


def _ssim(reference: Frames, other: Frames) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(reference.shape[1:3])
    window = min(11, side - 1 + side % 2)
    first, second = (
        torch.from_numpy(np.ascontiguousarray(c)).permute(0, 3, 1, 2).double()
        for c in (reference, other)
    )
    value = structural_similarity_index_measure(
        first, second, data_range=1.0, gaussian_kernel=window == 11, kernel_size=window
    )
    assert isinstance(value, torch.Tensor)
    return float(value)
