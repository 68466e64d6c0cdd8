"""Write the README tables from committed results and the code, so that none is typed by hand.

python bench/readme.py           # rewrite the README
python bench/readme.py --check   # exit 1 when it is not what this would write
python bench/readme.py --demo out/demo/report.json --kernels kernels.json   # take new results
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dittools.commands.terminal import first_line
from dittools.methods import METHODS
from dittools.patches import families as families_table
from dittools.pipelines.demo import WEIGHTS
from dittools.pipelines.output import write_text
from dittools.pipelines.report_html import HEADINGS, rows, summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
FLOORS = ("random", "dense, another seed")


def table(headings: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def take(source: Path, target: Path) -> None:
    """Copy one result, without the rows per layer that no table shows."""
    result = json.loads(source.read_text())
    for run in ("dense", "accelerated"):
        result.get(run, {}).get("report", {}).pop("layers", None)
    write_text(target, json.dumps(result, indent=1) + "\n")


def demo() -> str:
    return _comparison("demo-cpu.json")


def larger() -> str:
    return _comparison("demo-large-cpu.json")


def _comparison(name: str) -> str:
    report = _load(name)
    where = report["environment"]
    machine = (
        f"{where['threads']} CPU threads, torch {where['torch']}, diffusers {where['diffusers']}"
    )
    return f"{table(HEADINGS, rows(report))}\n\n{summary(report)} Measured on {machine}."


def methods() -> str:
    body = [(f"`{name}`", first_line(kind)) for name, kind in METHODS.items()]
    return table(("method", "what it does"), body)


def families() -> str:
    body = [
        (
            name,
            ", ".join(f"`{kind}`" for kind in facts.denoisers),
            "; ".join(facts.notes) or facts.blocked,
        )
        for name, facts in families_table().items()
    ]
    return table(("family", "denoiser classes", "to know"), body)


def matrix() -> str:
    sys.path.insert(0, str(Path(__file__).parent))
    from matrix import load, tables

    return tables(load())


def kernels() -> str:
    result = _load("kernels-cpu.json")
    keys = ("dtype", "tokens", "heads", "head_dim", "block")
    cells: dict[tuple[str, ...], dict[float, str]] = {}
    for row in result["rows"]:
        case = tuple(str(row[key]) for key in keys)
        cells.setdefault(case, {})[row["density"]] = f"{row['ratio']:.2f}"
    densities = sorted({row["density"] for row in result["rows"]})
    head = (*keys, *(f"density {d:g}" for d in densities))
    body = [(*case, *(found.get(d, "") for d in densities)) for case, found in cells.items()]
    note = "Time of the `cpu` backend over dense SDPA of the same dtype in the same run, median."
    return f"{note} {result['run']}.\n\n{table(head, body)}"


def score() -> str:
    result = json.loads((WEIGHTS / "score.json").read_text())
    shares = "".join(f", {name} {share:.0%}" for name, share in result["shares"].items())
    directions = ", ".join(f"{name} {share:.0%}" for name, share in result["directions"].items())
    return f"{result['pairs']} prompt and seed pairs{shares}; motion by direction: {directions}."


def scoreboard() -> str:
    """The densest-covered density of the board, best first; the page has the rest."""
    boards = _load("scoreboard.json")["densities"]
    density, lines = max(boards.items(), key=lambda pair: min(r["prompts"] for r in pair[1]))
    kept = [r for r in lines if abs(r["density"] - float(density)) <= 0.03]
    body = [
        (
            row["name"]
            + (f" ({row['detail']})" if row["detail"] and row["kind"] != "searched" else ""),
            f"{row['psnr_db']:.1f}",
            f"{row['ssim']:.3f}",
            f"{row['prompt']:.0%}",
        )
        for row in sorted(kept, key=lambda row: -row["psnr_db"])
    ]
    prompts = min(row["prompts"] for row in kept)
    head = f"density {density}, {prompts} held-out prompts"
    return table((head, "PSNR to dense, dB", "SSIM", "prompt score"), body)


def freeswim() -> str:
    result = _load("freeswim.json")
    body = [
        (name, row["what"], f"{row['one_object']} of {row['of']}", f"{row['mean_objects']:.1f}")
        for name, row in result["summary"].items()
    ]
    return table(("", "192 x 192 pixels but for the first", "one object", "objects, mean"), body)


def metered() -> str:
    """Metered attention beside what comes nearest to it, where other rows executed no more."""
    found, boards = _load("metered.json")["clips"], _load("scoreboard.json")["densities"]
    body = []
    for share, lines in found.items():
        board = [
            {**row, "name": row["name"] + (f" ({row['detail']})" if row["detail"] else "")}
            for row in boards.get(share, [])
            if row["kind"] == "method"
            and row["name"] not in ("metered", "clustered")
            and row["computed"] <= float(share) + 0.03
        ]
        fair = [r for r in board if abs(r["density"] - float(share)) <= 0.03]
        fair = sorted(fair, key=lambda r: -r["psnr_db"])[:2]
        alike = [r for r in lines if r["name"].startswith("with alike keys")]
        named = [{**r, "name": "metered, " + r["name"].partition(":")[0]} for r in alike]
        joined = [r for r in lines if r["kind"] == "combination"]
        joined = sorted(joined, key=lambda r: -r["psnr_db"])[:2]
        floors = [
            r for r in boards.get(share, []) if r["name"] in ("random", "dense, another seed")
        ]
        for row in [lines[0], *named, *joined, *fair, *floors]:
            numbers = (f"{row['psnr_db']:.1f}", f"{row['ssim']:.3f}", f"{row['prompt']:.0%}")
            executed = f"{row['computed']:.2f}"
            body.append((row["name"], executed, *numbers, str(row["prompts"])))
    head = ("", "executed share", "PSNR to dense, dB", "SSIM", "prompt score", "prompts")
    return table(head, body)


def robust() -> str:
    """What long and hostile runs gave."""
    fuzz, soak = _load("fuzz.json"), _load("soak.json")
    long, side = soak["long"], soak["side_by_side"]
    files, threads = (long[name][1] - long[name][0] for name in ("files", "threads"))
    return (
        f"{fuzz['plans']:,} damaged plans: {fuzz['escapes']} escapes, {fuzz['accepted']:,} still "
        f"plans, the others one readable error each. {long['runs']} generations in one process "
        f"with attach, detach and changing sizes: {long['mb_per_run']:.3f} MB per run, {files} "
        f"files and {threads} threads left open, {long['differing']} clips differ from the first "
        f"of their kind. {' and '.join(side['pipelines'])} in two threads, {side['runs_each']} "
        f"runs each: {side['differing']} differ."
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "larger": larger,
    "methods": methods,
    "families": families,
    "matrix": matrix,
    "scoreboard": scoreboard,
    "metered": metered,
    "robust": robust,
    "freeswim": freeswim,
    "kernels": kernels,
    "score": score,
}


def render(text: str) -> str:
    """Return the README with every section between its two marks written anew."""
    for name, write in SECTIONS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start not in text or end not in text:
            raise SystemExit(f"README.md lacks the marks of section {name}")
        body = f"{start}\n{write()}\n{end}"
        text = re.sub(f"{start}.*?{end}", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when stale")
    parser.add_argument("--demo", type=Path, metavar="FILE", help="report of `make demo` to take")
    parser.add_argument("--larger", type=Path, metavar="FILE", help="report at 16 x 128 x 128")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="rows of bench/kernels.py")
    args = parser.parse_args(argv)
    for name, source in (
        ("demo-cpu.json", args.demo),
        ("demo-large-cpu.json", args.larger),
        ("kernels-cpu.json", args.kernels),
    ):
        if source is not None:
            take(source, RESULTS / name)
    old = README.read_text()
    new = render(old)
    if args.check:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
