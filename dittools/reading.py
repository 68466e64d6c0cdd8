"""Files from elsewhere, hostile until parsed: size, depth and numbers are bounded before use.

Everything here raises OSError (cannot be read) or ValueError (is not what it should be), nothing
else, so that a loader needs one `except` clause for its own words. Nothing is unpickled or run.
"""

import hashlib
import json
import math
import re
import stat
import sys
from pathlib import Path
from typing import Any

import torch

MOST_JSON = 64_000_000  # bytes; the atlas of a 40-layer model takes 15 MB
MOST_TENSORS = 4_000_000_000  # bytes of a file that is read whole
MOST_HEADER = 8_000_000  # bytes that describe its tensors; 100,000 of them fit
DEEPEST = 32  # objects and lists inside each other
_LARGEST = 2**63 - 1
_DIGITS = 20  # of a whole number, its sign included, that is read at all
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """Return the bytes of an ordinary file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device, pipe or folder, or holds more than `most` bytes.
    """
    size = check_file(path, most)
    with Path(path).open("rb") as file:
        return file.read(size)  # never more, however it grows meanwhile


def check_file(path: str | Path, most: int) -> int:
    """Return the size of a file `read_bytes` would read; opening a pipe would wait for its writer.

    Raises:
        OSError, ValueError: as `read_bytes`.
    """
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no ordinary file")
    if found.st_size > most:
        raise ValueError(f"it holds {found.st_size} bytes, more than {most}")
    return found.st_size


def read_text(path: str | Path, most: int = MOST_JSON) -> str:
    """Return UTF-8 text, a byte order mark left out; raises as `read_bytes` does."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """Return the JSON values of a file; raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, most))


def parse_json(text: str | bytes) -> Any:
    """Return JSON values that are safe to work with.

    Raises:
        ValueError: no JSON, text that is no Unicode, a number that is not finite, a whole number
            that 64 bits do not hold, or values nested deeper than 32 levels.
    """
    blob = text.encode() if isinstance(text, str) else text
    try:
        content = json.loads(
            blob.decode("utf-8-sig"),
            parse_int=_whole,
            parse_float=_number,
            parse_constant=_no_number,
        )
    except RecursionError as error:
        raise ValueError(_DEEP) from error
    _check_depth(content)
    if _SURROGATE.search(blob):  # half a character would fail where it is written or shown
        json.dumps(content, ensure_ascii=False).encode()
    return content


def read_tensors(
    source: str | Path | bytes, most: int = MOST_TENSORS
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the notes of a safetensors file, or of its bytes.

    Memory stays below a small multiple of the file: what its header promises is compared with its
    length before anything is allocated.

    Raises:
        OSError, ValueError: as `read_bytes`, or it is damaged.
    """
    from safetensors.torch import load

    blob = source if isinstance(source, bytes) else read_bytes(source, most)
    length = int.from_bytes(blob[:8], "little")
    if not 2 <= length <= min(len(blob) - 8, MOST_HEADER):
        raise ValueError("its header is damaged")
    header = parse_json(blob[8 : 8 + length])
    notes = header.get("__metadata__") if isinstance(header, dict) else None
    try:
        tensors: dict[str, torch.Tensor] = load(blob)
    except Exception as error:  # the reader has an error type per kind of damage
        raise ValueError(f"it holds no tensors: {_first_line(error)}") from error
    return tensors, {str(k): str(v) for k, v in (notes or {}).items()}


def beside(path: Path, name: Any) -> Path:
    """Return the path of a file that `path` names and that must lie in the same folder.

    A link is followed within that folder, or within the folder `path` itself is linked to.

    Raises:
        ValueError: the name holds a folder, a drive or no text, or leads elsewhere.
    """
    if not is_plain_name(name):
        raise ValueError(f"{name!r} is no plain file name")
    found: Path = path.parent / name
    try:
        homes = (path.parent.resolve(), path.resolve().parent)
        leads_out = found.resolve().parent not in homes
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"{name!r} cannot be followed") from error
    if leads_out:
        raise ValueError(f"{name!r} leads to another folder")
    return found


def within(folder: Path, name: Any) -> Path:
    """Return the path of a file that must lie in a folder or below it, links followed.

    Raises:
        ValueError: it does not, or `name` is no relative path of plain names.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    if not all(is_plain_name(part) for part in parts):
        raise ValueError(f"{name!r} is no path inside the folder")
    found: Path = folder.joinpath(*parts)
    try:
        leads_out = not found.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"{name!r} cannot be followed") from error
    if leads_out:
        raise ValueError(f"{name!r} leads to another folder")
    return found


def digest(path: Path) -> str:
    """Return the SHA-256 of an ordinary file, read piece by piece.

    Raises:
        OSError, ValueError: as `read_bytes`, whatever its size.
    """
    check_file(path, sys.maxsize)
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def is_plain_name(name: Any) -> bool:
    """Whether a value is the name of a file in some folder, on every system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and name.isprintable()
        and not any(c in "/\\:" for c in name)
    )


def misfit(value: Any, shape: Any, where: str = "it") -> str:
    """Return where JSON values differ from a shape, "" where they fit.

    Args:
        value: JSON values.
        shape: a type (float takes whole numbers too, none takes True for a number); a tuple of
            shapes, one of which must fit, None for null; a list of one shape for a list of such; or
            an object of shapes, where "name?" may be left out and "*" stands for every other key.
        where: what the values are called.
    """
    if isinstance(shape, tuple):
        found = [misfit(value, each, where) for each in shape]
        return "" if "" in found else found[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(
            (m for n, v in enumerate(value) if (m := misfit(v, shape[0], f"{where}[{n}]"))), ""
        )
    if isinstance(shape, dict):
        return _misfit_object(value, shape, where)
    if shape is None or shape is Any:
        return "" if shape is Any or value is None else f"{where} is not null"
    kinds = (int, float) if shape is float else shape
    good = isinstance(value, kinds) and (shape is bool or not isinstance(value, bool))
    return "" if good else f"{where} is no {shape.__name__}"


def _misfit_object(value: Any, shape: dict[str, Any], where: str) -> str:
    if not isinstance(value, dict):
        return f"{where} is no object"
    for key, wanted in shape.items():
        name = key.removesuffix("?")
        if key == "*" or (name not in value and name != key):
            continue
        if name not in value:
            return f"{where} lacks {name}"
        if found := misfit(value[name], wanted, f"{where}.{name}"):
            return found
    others = [k for k in value if k not in shape and f"{k}?" not in shape] if "*" in shape else []
    return next((m for k in others if (m := misfit(value[k], shape["*"], f"{where}.{k}"))), "")


_DEEP = f"nested deeper than {DEEPEST} levels"


def _check_depth(content: Any) -> None:
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(DEEPEST):
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
    if level:
        raise ValueError(_DEEP)


def _whole(text: str) -> int:
    found = int(text) if len(text) <= _DIGITS else _LARGEST + 1
    if not -_LARGEST <= found <= _LARGEST:
        raise ValueError(f"{text[:24]} has more than 64 bits")
    return found


def _number(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text[:20]} is too large for a number")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
