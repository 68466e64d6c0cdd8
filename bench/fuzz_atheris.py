"""Coverage-guided fuzzing of every loader: libFuzzer, through atheris, chooses the damage.

    python bench/fuzz_atheris.py [--time 600] [--only plan,tables] [--out out/fuzz]

Each loader runs in a process of its own for its share of the time, under a memory limit. The bytes
libFuzzer makes lead the structured damage of `hostile`, or stand for one of the files as they are.
An input that escapes is kept in the folder and named; the exit code is 1 then. `--replay FILE`
runs one such input again.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MEMORY_MB = 3000
SLOWEST = 20  # seconds for one input
SEEDS = 24


class Led(random.Random):
    """Draws from given bytes, and zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        count = (k + 7) // 8
        piece = self._data[self._at : self._at + count]
        self._at += count
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(24) / (1 << 24)


def target(name: str) -> Any:
    """Return the function that feeds one loader."""
    import atheris

    sys.path.insert(0, str(Path(__file__).parent))
    with atheris.instrument_imports(include=["dittools"]):
        import fuzz_plans
        import hostile
        import loaders

    loader, guard = loaders.LOADERS[name], hostile.Guard()
    files = loader.files()
    inside, elsewhere = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp()) / "secret"
    elsewhere.write_bytes(b"not yours")
    hostile.lay_out(fuzz_plans.Steady(), inside, files, elsewhere)
    loader.load(inside)

    def one(data: bytes) -> None:
        draw = Led(data[1:])
        if data[:1] < b"\x40":  # one file is the bytes themselves
            held = sorted(files)
            found = {**files, held[len(data) % len(held)]: data[1:]}
        else:
            found = hostile.damage(draw, files)
        hostile.lay_out(draw, inside, found, elsewhere)
        try:
            with guard.watching(inside):
                loader.load(inside)
        except loaders.DitToolsError:
            pass

    return one


def child(name: str, arguments: list[str]) -> None:
    """Fuzz one loader in this process; does not come back."""
    import atheris

    one = target(name)
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def corpus(name: str, folder: Path) -> None:
    """Write the inputs to start from: bytes that lead damage, and the valid files."""
    import fuzz_plans  # noqa: F401 - puts the bench folder's modules in order
    import loaders

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(name)
    for number in range(SEEDS):
        (folder / f"seed-{number}").write_bytes(b"\xff" + draw.randbytes(64 + 8 * number))
    for number, blob in enumerate(loaders.LOADERS[name].files().values()):
        (folder / f"file-{number}").write_bytes(b"\0" + blob)


def fuzz(name: str, seconds: int, out: Path) -> tuple[int, list[Path]]:
    """Return how many inputs a loader was given, and those that escaped."""
    corpus(name, out / name)
    before = set(out.glob(f"{name}-*"))
    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SLOWEST}"]
    options += ["-print_final_stats=1", "-max_len=65536", f"-artifact_prefix={out}/{name}-"]
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, *options, str(out / name)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    (out / f"{name}.log").write_text(done.stderr[-20_000:], encoding="utf-8")
    count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    escaped = sorted(set(out.glob(f"{name}-*")) - before)
    if done.returncode and not escaped:
        raise SystemExit(f"{name} did not run:\n{done.stderr[-2000:]}")
    return int(count[1]) if count else 0, escaped


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=int, default=600, help="seconds in all")
    parser.add_argument("--only", default="", help="names with commas between them")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--replay", type=Path, help="an input that escaped")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if options.replay:
        target(options.replay.name.partition("-")[0])(options.replay.read_bytes())
        return 0
    import loaders

    names = options.only.split(",") if options.only else list(loaders.LOADERS)
    options.out.mkdir(parents=True, exist_ok=True)
    total, escapes = 0, []
    for name in names:
        count, escaped = fuzz(name, max(options.time // len(names), 1), options.out)
        total, escapes = total + count, [*escapes, *escaped]
        print(f"{name:10} {count:8} inputs, {len(escaped)} escaped", flush=True)
    print(f"{'all':10} {total:8} inputs, {len(escapes)} escaped {' '.join(map(str, escapes))}")
    return int(bool(escapes))


if __name__ == "__main__":
    sys.exit(main())
