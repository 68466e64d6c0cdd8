"""Files on disk: whole or not there, readable by a player, true to the frames."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from dittools.errors import InputError
from dittools.metrics import compare
from dittools.pipelines.output import (
    atomic,
    check_writable,
    contact_sheet,
    side_by_side,
    write_clip,
)


def _clip(frames: int = 5, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth gradient that moves, which H.264 keeps well."""
    x = np.linspace(0, 1, width, dtype=np.float32)
    shift = np.arange(frames, dtype=np.float32)[:, None, None] * 0.05
    base = np.broadcast_to((x[None, None] + shift) % 1 * 0.5 + 0.2, (frames, height, width))
    return np.stack([base, 1 - base, base * 0 + 0.5], axis=-1)


def test_an_mp4_reads_back_as_the_frames_written(tmp_path: Path) -> None:
    frames = _clip()
    path = write_clip(tmp_path / "clip.mp4", frames, fps=8)
    back = iio.imread(path).astype(np.float32) / 255
    factor = back.shape[1] // frames.shape[1]
    assert back.shape == (5, 48 * factor, 64 * factor, 3)
    assert compare(frames, back[:, ::factor, ::factor]).psnr_db > 30


@pytest.mark.parametrize(("height", "width"), [(47, 33), (200, 301)])
def test_odd_sides_are_written_too(tmp_path: Path, height: int, width: int) -> None:
    back = iio.imread(write_clip(tmp_path / "odd.mp4", _clip(3, height, width), fps=8))
    assert len(back) == 3
    assert back.shape[1] % 2 == back.shape[2] % 2 == 0


def test_one_frame_becomes_a_png(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", _clip(1), fps=8)
    assert path.name == "clip.png"
    assert not (tmp_path / "clip.mp4").exists()
    assert np.asarray(Image.open(path)).shape[2] == 3


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        check_writable(in_the_way / "out")


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a b" / "c")
    assert list((tmp_path / "a b" / "c").iterdir()) == []


def test_side_by_side_keeps_both_clips(tmp_path: Path) -> None:
    left, right = _clip(), 1 - _clip()
    pair = side_by_side([left, right])
    assert np.array_equal(pair[:, :, :64], left)
    assert np.array_equal(pair[:, :, -64:], right)


@pytest.mark.parametrize("title", ["a red circle", "日本語 <b>&", "x" * 500])
def test_a_contact_sheet_has_one_row_per_clip(tmp_path: Path, title: str) -> None:
    one = contact_sheet(tmp_path / "one.png", title, [("a", _clip())])
    two = contact_sheet(tmp_path / "two.png", title, [("a", _clip()), ("b", _clip(1))])
    heights = [Image.open(path).height for path in (one, two)]
    assert heights[1] > 1.6 * heights[0]
