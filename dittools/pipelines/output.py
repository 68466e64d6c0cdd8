"""Clips on disk: mp4, png, side by side, contact sheet. Every write is atomic."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dittools.errors import InputError

Frames = npt.NDArray[np.float32]  # [frames, height, width, 3], 0..1
Pixels = npt.NDArray[np.uint8]

LABEL_HEIGHT = 18  # pixels, room for one line of the default font


@contextmanager
def disk_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn what the disk refuses within the block into one line: `what` failed, and why."""
    try:
        yield
    except OSError as error:
        raise InputError(what, got=error.strerror or str(error), remedy=remedy) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when the block succeeds.

    Raises:
        InputError: the folder cannot be made or written.
    """
    with disk_errors(f"cannot write to {path.parent}", "another --out folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise InputError now when nothing can be written to a folder, before long work starts."""
    with atomic(folder / ".write-test") as probe:
        probe.write_bytes(b"")
    (folder / ".write-test").unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_clip(path: Path, frames: Frames, fps: int) -> Path:
    """Write an mp4, or a png when the clip is one frame; return the path written.

    Frames are enlarged by a whole factor to at least 192 pixels high, so that players show small
    clips sharp; odd sides gain one repeated row or column, which H.264 needs.
    """
    import imageio.v3 as iio

    pixels = enlarge(to_pixels(frames))
    if len(pixels) == 1:
        path = path.with_suffix(".png")
        with atomic(path) as temporary:
            iio.imwrite(temporary, pixels[0])
        return path
    even = np.pad(
        pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), "edge"
    )
    with atomic(path) as temporary:
        iio.imwrite(
            temporary,
            even,
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-crf", "14", "-pix_fmt", "yuv420p", "-movflags", "+faststart"],
        )
    return path


def to_pixels(frames: Frames) -> Pixels:
    """Return uint8 [F, H, W, 3]."""
    return (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)


def enlarge(pixels: Pixels, least_height: int = 192) -> Pixels:
    """Repeat pixels by the smallest whole factor that reaches a height."""
    factor = max(1, -(-least_height // pixels.shape[1]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def side_by_side(clips: Sequence[Frames]) -> Frames:
    """Return the clips next to each other with a white gap of 4 pixels."""
    gap = np.ones((*clips[0].shape[:2], 4, 3), np.float32)
    parts = [clips[0]]
    for clip in clips[1:]:
        parts += [gap, clip]
    return np.concatenate(parts, axis=2)


def contact_sheet(
    path: Path, title: str, rows: Sequence[tuple[str, Frames]], columns: int = 6
) -> Path:
    """Write a png: a title, then per row a label and `columns` frames spread over the clip."""
    from PIL import Image, ImageDraw

    gap, side = 4, enlarge(to_pixels(rows[0][1][:1]), 128)[0].shape
    count = min(columns, len(rows[0][1]))
    sheet_width = max(count * (side[1] + gap) + gap, 480)
    row_height = side[0] + LABEL_HEIGHT + gap
    sheet = Image.new("RGB", (sheet_width, LABEL_HEIGHT + gap + row_height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), _plain(title), fill="black")
    for number, (label, frames) in enumerate(rows):
        top = LABEL_HEIGHT + gap + number * row_height
        draw.text((gap, top + 3), _plain(label), fill="black")
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
        for column, image in enumerate(enlarge(to_pixels(frames[chosen]), 128)):
            place = (gap + column * (side[1] + gap), top + LABEL_HEIGHT)
            sheet.paste(Image.fromarray(image), place)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return path


def _plain(text: str) -> str:
    """Keep what Pillow's built-in font can draw, so that any prompt is accepted."""
    return text.encode("latin-1", "replace").decode("latin-1")[:160]
