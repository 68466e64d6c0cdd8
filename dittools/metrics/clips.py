"""Clips read from disk, pixel for pixel as a player decodes them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from dittools.errors import InputError
from dittools.reading import check_file

Pixels = npt.NDArray[np.uint8]  # [frames, height, width, 3], RGB

VIDEO = (".mp4", ".mov", ".mkv", ".webm", ".avi")
IMAGE = (".png", ".jpg", ".jpeg")
MOST_BYTES = 2_000_000_000  # of one file, and of the pixels of one clip: 321 frames of 1080p
# what a file of each kind begins with; anything else may be a list that names other files
_BEGINS = {
    (".mp4", ".mov"): re.compile(rb"....(ftyp|moov|mdat|free|wide|skip)", re.DOTALL),
    (".mkv", ".webm"): re.compile(rb"\x1aE\xdf\xa3"),
    (".avi",): re.compile(rb"RIFF....AVI ", re.DOTALL),
    (".png",): re.compile(rb"\x89PNG\r\n\x1a\n"),
    (".jpg", ".jpeg"): re.compile(rb"\xff\xd8\xff"),
}


@dataclass(frozen=True)
class Clip:
    """One decoded file.

    Attributes:
        path: where it lies.
        pixels: uint8 [F, H, W, 3], RGB.
        fps: as the file says; 0 for an image.
    """

    path: Path
    pixels: Pixels
    fps: float


def opencv() -> ModuleType:
    """Return the cv2 module, its decoder's chatter turned off.

    Raises:
        InputError: OpenCV is not installed.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            "video quality needs OpenCV", remedy="pip install 'dittools[quality]'"
        ) from error
    return cv2


def find_clips(folder: Path) -> list[Path]:
    """Return the videos of a folder, or its images where it has no video, sorted.

    Hidden files are left out.

    Raises:
        InputError: no such folder, or nothing to measure in it.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError("no such folder", expected="a folder of clips", got=str(folder))
    seen = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    videos = [path for path in seen if path.suffix.lower() in VIDEO]
    found = videos or [path for path in seen if path.suffix.lower() in IMAGE]
    if not found:
        raise InputError(
            f"{folder} holds no clip", expected=f"files named {', '.join('*' + s for s in VIDEO)}"
        )
    return found


def read_clip(path: Path) -> Clip:
    """Return the frames of a video or image, decoded by OpenCV as VBench does.

    Raises:
        InputError: the file is missing, no video, empty, or breaks off before its end.
    """
    cv2 = opencv()
    if not path.is_file():
        raise InputError("no such clip", got=str(path))
    _check_kind(path)
    if path.suffix.lower() in IMAGE:
        try:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        except cv2.error as error:  # more pixels than it reads
            raise InputError(f"cannot read {path}", got=str(error)) from error
        if image is None:
            raise InputError(f"cannot read {path}", expected="a png or jpeg image")
        return Clip(path, np.ascontiguousarray(image[None, :, :, ::-1]), 0.0)
    video = cv2.VideoCapture(str(path))
    frames: list[Pixels] = []
    try:
        promised = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(video.get(cv2.CAP_PROP_FPS))
        size = int(video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT)) * 3
        most = MOST_BYTES // max(size, 1)
        while size <= MOST_BYTES:
            success, frame = video.read()
            if not success:
                break
            if len(frames) >= most:
                raise InputError(f"{path} is too long", expected=f"at most {most} frames")
            frames.append(np.ascontiguousarray(frame[:, :, ::-1]))
    except cv2.error as error:
        raise InputError(f"cannot read {path}", got=str(error)) from error
    finally:
        video.release()
    if not frames:
        raise InputError(f"cannot read {path}", expected="a video with at least one frame")
    if len(frames) + 1 < promised:  # containers round their frame count by one at times
        raise InputError(
            f"{path} breaks off", expected=f"{promised} frames", got=f"{len(frames)} readable"
        )
    return Clip(path, np.stack(frames), fps)


def _check_kind(path: Path) -> None:
    """Refuse a file that is not what its name says, before a decoder guesses what it is."""
    wanted = next((found for ends, found in _BEGINS.items() if path.suffix.lower() in ends), None)
    try:
        check_file(path, MOST_BYTES)
        with path.open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", got=str(error)) from error
    if wanted is None or wanted.match(head) is None:
        raise InputError(
            f"cannot read {path}",
            expected=f"a file that is what its name says: {', '.join((*VIDEO, *IMAGE))}",
            got=repr(head[:8]),
        )


def check_frames(frames: npt.NDArray[np.float32], name: str = "the clip") -> None:
    """Refuse what is no clip [F, H, W, 3] of finite values.

    Raises:
        InputError: with the shape, or the first frame that holds NaN or infinity.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(
            f"{name} cannot be measured",
            expected="[frames, height, width, 3], none of them 0",
            got=str(frames.shape),
        )
    if not np.isfinite(frames).all():
        bad = int(np.argwhere(~np.isfinite(frames))[0][0])
        raise InputError(f"{name} holds NaN or infinity, first in frame {bad}")


def same_shape(clips: Sequence[Clip]) -> None:
    """Refuse clips of different length or size, naming both.

    Raises:
        InputError: two clips differ.
    """
    for clip in clips[1:]:
        if clip.pixels.shape != clips[0].pixels.shape:
            raise InputError(
                f"{clip.path.name} and {clips[0].path.name} differ in length or size",
                expected=_size(clips[0]),
                got=_size(clip),
            )


def as_float(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Return [F, H, W, 3] in 0..1."""
    scaled: npt.NDArray[np.float32] = pixels.astype(np.float32) / np.float32(255)
    return scaled


def _size(clip: Clip) -> str:
    frames, height, width, _ = clip.pixels.shape
    return f"{frames} frames of {width} x {height}"
