"""Damage done to valid files, and a guard that sees what a loader does with them.

The damage follows the format: JSON values are swapped for hostile ones, safetensors headers are
rewritten, files become links and folders; then bytes may change anywhere. Everything is drawn from
one `random.Random`, so that a seed, Hypothesis or a fuzzer can each lead.
"""

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dittools.errors import DitToolsError

Files = dict[str, bytes]
DEEP = (10, 31, 32, 33, 200, 2000, 100_000)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 65, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**63),
    *(0.0, -0.0, 0.5, 1.0, 1 - 1e-12, 1e-300, 1e300, -1e300, 0.1, 1e9, 10**9, 10**30),
    *(True, False),
)
TEXTS = (
    *(
        "",
        " ",
        "all",
        "cond",
        "auto",
        "dense",
        "none",
        "None",
        "nan",
        "full",
        "x" * 3000,
        "é",
        "\0",
    ),
    *("../../secret", "../secret", "/etc/passwd", "/dev/zero", "/dev/stdin", "~/.netrc", "C:\\x"),
    *("\\\\host\\share", "file:///etc/passwd", "a/b", ".", "..", "a\nb", "\ud800", "\u202e\x1b[2J"),
    *("${HOME}", "{0.__class__}", "%s%n", "__import__('os').system('true')", "<script>", "L9H9"),
)


def hostile_value(draw: random.Random) -> Any:
    """Return a value that a loader may not expect."""
    kind = draw.randrange(8)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 5:
        return draw.choice(TEXTS)
    few = (None, [], {}, [[]], [None], [{}], {"": None}, ["all"], {"tensor": "x"}, {"tensor": []})
    if kind == 5:
        return draw.choice(few)
    if kind == 6:
        return [draw.choice(NUMBERS) for _ in range(draw.choice((1, 2, 3, 5, 300)))]
    return {draw.choice(TEXTS): draw.choice(NUMBERS), "tensor": draw.choice(TEXTS)}


def mutate_json(draw: random.Random, content: Any, times: int) -> Any:
    """Return a copy of JSON values with some of them replaced, dropped, added, moved or wrapped."""
    content = json.loads(json.dumps(content))
    for _ in range(times):
        places = list(_places(content))
        if not places:
            return hostile_value(draw)
        inner = [(owner, key) for owner, key, is_inner in places if is_inner]
        places = inner if inner and draw.random() < 0.6 else [(o, k) for o, k, _ in places]
        owner, key = draw.choice(places)
        kind = draw.randrange(10)
        if kind < 5:
            owner[key] = hostile_value(draw)
        elif kind == 5:
            del owner[key]
        elif kind == 6 and isinstance(owner, dict):
            owner[draw.choice((*TEXTS, "x", "file", "params", "tables"))] = owner[key]
        elif kind == 7:
            other, place = draw.choice(places)
            owner[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else 0))
        elif kind == 8:
            owner[key] = [owner[key]] if draw.random() < 0.5 else {"x": owner[key]}
        else:
            owner[key] = _near(draw, owner[key])
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any, bool]]:
    """Yield every (owner, key), and whether it is one of a method's parameters."""
    level = [(content, False)]
    while level:
        owner, is_inner = level.pop()
        keys = owner if isinstance(owner, dict) else range(len(owner))
        for key in list(keys):
            yield owner, key, is_inner
            if isinstance(owner[key], (dict, list)):
                level.append((owner[key], is_inner or key == "params"))


def _near(draw: random.Random, value: Any) -> Any:
    """Return a value a little beside one."""
    if isinstance(value, bool) or value is None:
        return draw.choice((0, 1, "true", None))
    if isinstance(value, (int, float)):
        return draw.choice((value + 1, value - 1, -value, value * 10**9, value / 3, str(value)))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), value + "\0", f"../{value}"))
    return draw.choice((list(value) * 3, str(value)))


def write_json(draw: random.Random, content: Any) -> bytes:
    """Return the JSON text of values, now and then nested too deeply or with a number too long."""
    text = json.dumps(content)
    kind = draw.randrange(50)
    if kind == 0:
        depth = draw.choice(DEEP)
        text = text.replace("1", "[" * depth + "1" + "]" * depth, 1)
    elif kind == 1:
        text = text.replace(
            "1", draw.choice(("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-0", "01")), 1
        )
    elif kind == 2:
        text = text.replace("{", '{"format": 1, ', 1)  # a key twice
    return text.encode(draw.choice(("utf-16", "utf-8-sig")) if kind == 3 else "utf-8")


def mutate_bytes(draw: random.Random, blob: bytes) -> bytes:
    """Return bytes cut, flipped, doubled, inserted or overwritten."""
    kind, at = draw.randrange(6), draw.randrange(len(blob) + 1)
    if kind == 0:
        return blob[:at]
    if kind == 1:
        return blob + blob[at : at + 200]
    if kind == 2:
        return blob[:at] + draw.randbytes(draw.randrange(1, 9)) + blob[at:]
    if kind == 3:
        return b"" if draw.random() < 0.2 else draw.randbytes(draw.randrange(64))
    changed = bytearray(blob)
    for place in {draw.randrange(len(blob)) for _ in range(draw.randrange(1, 5))} if blob else ():
        changed[place] = draw.randrange(256) if kind == 4 else changed[place] ^ (1 << place % 8)
    return bytes(changed)


def mutate_tensors(draw: random.Random, blob: bytes) -> bytes:
    """Return a safetensors file whose header says something else, or whose bytes are damaged."""
    length = int.from_bytes(blob[:8], "little")
    header, body = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    kind = draw.randrange(6)
    if kind == 0:
        return mutate_bytes(draw, blob)
    if kind == 1:
        claimed = draw.choice((0, 1, length - 1, length + 1, len(blob), 2**31, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + blob[8:]
    if kind == 2 and header:
        entry = header[draw.choice(list(header))]
        for key, values in (
            ("shape", ([10**9], [10**18, 10**18], [0, 10**18], [-1], [], [2.5], "8", None)),
            ("dtype", ("F64", "F32", "BF16", "U8", "I64", "BOOL", "F4", "F8_E4M3", "C64", "x", 1)),
            ("data_offsets", ([0, 10**12], [8, 0], [-8, 0], [0], [0, 2**63], "0:8", None)),
        ):
            if draw.random() < 0.5:
                entry[key] = draw.choice(values)
    else:
        header = mutate_json(draw, header, draw.randrange(1, 4))
    text = write_json(draw, header)
    return len(text).to_bytes(8, "little") + text + body


def damage(draw: random.Random, files: Files) -> Files:
    """Return a damaged copy of files of one plan; checksums are often made to fit again."""
    found = dict(files)
    name = draw.choice(sorted(found))
    if name.endswith(".json"):
        content = mutate_json(draw, json.loads(found[name]), draw.choice((1, 1, 1, 2, 3)))
        found[name] = write_json(draw, content)
        if draw.random() < 0.1:
            found[name] = mutate_bytes(draw, found[name])
    elif name.endswith(".safetensors"):
        found[name] = mutate_tensors(draw, found[name])
        for other in [n for n in found if n.endswith(".json")] if draw.random() < 0.9 else ():
            old, new = (hashlib.sha256(f[name]).hexdigest().encode() for f in (files, found))
            found[other] = found[other].replace(old, new)
    else:
        found[name] = mutate_bytes(draw, found[name])
    return found


def lay_out(draw: random.Random, folder: Path, files: Files, outside: Path) -> None:
    """Write files, emptying the folder first; now and then one is a folder or leads outside."""
    for old in folder.iterdir():
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    for name, blob in files.items():
        kind = draw.randrange(300)
        path = folder / name
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            path.symlink_to(outside)
        elif kind == 2:
            path.symlink_to(draw.choice(("/dev/zero", "/dev/null", name, "..")))
        elif kind != 3:  # else it is missing
            path.write_bytes(blob)


class Escape(Exception):
    """A loader did what it must not."""


class Guard:
    """Watches one loader at a time: errors that are not dittools' own, files opened elsewhere."""

    def __init__(self) -> None:
        """Listen to the interpreter's own record of opened files and started programs."""
        self._home = ""
        self._seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if not self._home:
            return
        if event == "open" and isinstance(details[0], (str, bytes)):
            name = details[0] if isinstance(details[0], str) else details[0].decode()
            writes = isinstance(details[1], str) and set(details[1]) & set("wax+")
            code = name.endswith((".py", ".pyc", ".so")) and not writes
            if not code and not Path(name).absolute().is_relative_to(self._home):
                self._seen.append(f"opened {name}")
        elif event in (
            "subprocess.Popen",
            "os.system",
            "exec",
            "pickle.find_class",
            "socket.connect",
        ):
            if event == "exec" and getattr(details[0], "co_filename", "").endswith(".py"):
                return  # a module imported late
            self._seen.append(f"{event} {details!r:.80}")

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Raise Escape unless the block ends well or in a DitToolsError and stays in the folder.

        Temporary files go there too.
        """
        usual, tempfile.tempdir = tempfile.tempdir, str(folder)
        self._home, self._seen = str(folder), []
        try:
            yield
        except DitToolsError as error:
            if "\n" in str(error) or len(str(error)) > 5000:
                raise Escape(f"an error of {len(str(error))} characters") from error
            raise
        except (Exception, RecursionError, MemoryError) as error:
            raise Escape(f"{type(error).__name__}: {error!s:.200}") from error
        finally:
            self._home, tempfile.tempdir = "", usual
            if self._seen:
                raise Escape("; ".join(self._seen[:3]))
