"""Units of work: each done once, kept in a file, shared between processes; killed runs go on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError
from dittools.pipelines.output import atomic, disk_errors
from dittools.pipelines.ranks import place
from dittools.reading import read_tensors, read_text

MOST_PROMPT_BYTES = 8_000_000
ROOM = "the same command with room on the disk: finished work is kept"
Result = dict[str, torch.Tensor]
Report = Callable[[str, int, int], None]  # (what, units done, units in all)


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        key: names it for good: same key, same result.
        owner: whole number that is spread over the processes.
        run: does it.
    """

    key: str
    owner: int
    run: Callable[[], Result]


class Store:
    """Does units and remembers their results.

    Args:
        folder: where results are kept; None keeps them in memory only.
        report: called before the first unit and after every one.
    """

    def __init__(self, folder: Path | None, report: Report | None = None) -> None:
        """Find this process's place among the others."""
        self.folder, self._report = folder, report
        self.rank, self.world = place()
        self._known: dict[str, Result] = {}
        self.done = 0  # units this process really ran

    def run(self, what: str, units: Sequence[Unit]) -> list[Result]:
        """Return the results in the order of the units; all processes get all of them."""
        if self._report is not None and self.rank == 0:
            self._report(what, 0, len(units))
        for finished, unit in enumerate(units, start=1):
            if unit.owner % self.world == self.rank and self._load(unit.key) is None:
                self._save(unit.key, unit.run())
                self.done += 1
            if self._report is not None and self.rank == 0:
                self._report(what, finished, len(units))
        if self.world > 1:
            self._exchange(units)
        return [self._known[unit.key] for unit in units]

    def once(self, key: str, make: Callable[[], Result]) -> Result:
        """Return a result only this process needs; from its file when there is one."""
        found = self._load(key)
        if found is None:
            found = make()
            self._save(key, found)
        return found

    def forget(self, key: str) -> None:
        """Drop a large result from memory; its file stays."""
        if self.folder is not None:
            self._known.pop(key, None)

    def tell(self, what: str, done: int, total: int) -> None:
        """Report work that is not run as units."""
        if self._report is not None and self.rank == 0:
            self._report(what, done, total)

    def _path(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        safe = hashlib.sha256(key.encode()).hexdigest()[:24]
        return self.folder / f"{safe}.safetensors"

    def _load(self, key: str) -> Result | None:
        """Return a known result; a file that cannot be read counts as not there."""
        if key in self._known:
            return self._known[key]
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            found, notes = read_tensors(path)
            if notes.get("sha256", found_digest := digest_of(found)) != found_digest:
                raise ValueError("it is not what was written")
        except (OSError, ValueError):
            _remove(path)  # damaged on disk: the unit is done again
            return None
        self._known[key] = found
        return found

    def _save(self, key: str, result: Result) -> None:
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in result.items()}
        self._known[key] = ready
        path = self._path(key)
        if path is not None:
            from safetensors.torch import save

            remedy = f"{ROOM}, or in another --work folder"
            with (
                disk_errors(f"cannot keep finished work in {self.folder}", remedy),
                atomic(path) as temporary,
            ):
                temporary.write_bytes(save(ready, {"sha256": digest_of(ready)}))

    def _exchange(self, units: Sequence[Unit]) -> None:
        """Give every process the results of the others, as bytes of safetensors."""
        import torch.distributed as dist
        from safetensors.torch import load, save

        for unit in units:
            source = unit.owner % self.world
            mine = source == self.rank
            blob = save(self._known[unit.key]) if mine else b""
            length = torch.tensor([len(blob)])
            dist.broadcast(length, source)
            body = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if mine else None
            if body is None:
                body = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(body, source)
            if not mine and unit.key not in self._known:
                self._save(unit.key, load(body.numpy().tobytes()))


def digest_of(result: Result) -> str:
    """Return the SHA-256 of names, shapes, types and values."""
    found = hashlib.sha256()
    for name in sorted(result):
        tensor = result[name]
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _remove(path: Path) -> None:
    with disk_errors(f"cannot remove the damaged {path}", "another --work folder"):
        path.unlink(missing_ok=True)


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that stand for JSON values and strings, the same in every process.

    Of a diffusers config the note which values are defaults is left out: its order is that of a set
    of strings, another one in every process.
    """
    plain = [
        {k: v for k, v in part.items() if k != "_use_default_values"}
        if isinstance(part, dict)
        else part
        for part in parts
    ]
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(module: torch.nn.Module) -> str:
    """Return a digest of names, shapes and a sample of every parameter: 64 values of each.

    Of weights that sequential offloading holds elsewhere, only names and shapes are at hand.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:
            continue
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // 64)
        digest.update(flat[::step][:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, one a line, blank lines left out.

    Raises:
        InputError: missing, not UTF-8, or empty.
    """
    try:
        text = read_text(path, MOST_PROMPT_BYTES)
    except OSError as error:
        raise InputError(
            f"cannot read the prompts file {path}: {error.strerror or error}",
            remedy="a UTF-8 text file with one prompt a line",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompts file {path} is not UTF-8",
            got=f"byte {error.object[error.start]:#04x} at position {error.start}",
            remedy="save it as UTF-8",
        ) from error
    except ValueError as error:
        raise InputError(f"cannot read the prompts file {path}", got=str(error)) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"the prompts file {path} holds no prompt", remedy="one prompt a line")
    return prompts
