"""PSNR and SSIM against another implementation, and where they must not be silent."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dittools.errors import InputError
from dittools.metrics import compare


def _pair(shape: tuple[int, ...] = (3, 40, 50, 3)) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    clip = (draw.random(shape) * 0.6 + 0.2).astype(np.float32)
    return clip, np.clip(clip + draw.normal(0, 0.05, shape), 0, 1).astype(np.float32)


def test_equal_to_scikit_image() -> None:
    clip, noisy = _pair()
    result = compare(clip, noisy)
    ssim = [
        structural_similarity(
            a, b, data_range=1, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
        )
        for a, b in zip(clip, noisy, strict=True)
    ]
    assert result.psnr_db == pytest.approx(peak_signal_noise_ratio(clip, noisy, data_range=1))
    # the packages treat a border of 5 pixels differently
    assert result.ssim == pytest.approx(np.mean(ssim), abs=2e-3)
    assert len(result.frame_psnr_db) == 3


def test_identical_clips_reach_the_cap_and_noise_lowers_both() -> None:
    clip, noisy = _pair()
    same, less, more = compare(clip, clip), compare(clip, noisy), compare(clip, 1 - clip)
    assert (same.psnr_db, same.ssim) == (120.0, pytest.approx(1.0))
    assert same.psnr_db > less.psnr_db > more.psnr_db
    assert same.ssim > less.ssim > more.ssim


def test_frames_smaller_than_the_window_are_measured() -> None:
    clip, noisy = _pair((2, 5, 7, 3))
    assert 0 < compare(clip, noisy).ssim < 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_frame_that_is_not_finite_is_named(value: float) -> None:
    clip, noisy = _pair()
    noisy[1, 0, 0, 0] = value
    with pytest.raises(InputError, match="second clip holds NaN or infinity, first in frame 1"):
        compare(clip, noisy)


def test_clips_of_different_size_are_refused() -> None:
    clip, noisy = _pair()
    with pytest.raises(InputError, match=r"\(3, 40, 50, 3\) and \(2, 40, 50, 3\)"):
        compare(clip, noisy[:2])
