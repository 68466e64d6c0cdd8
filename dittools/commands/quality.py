"""`dittools quality`: how good clips are, dimension by dimension."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dittools.errors import InputError
from dittools.metrics.clips import find_clips, read_clip
from dittools.metrics.vbench import Quality, Weights

COMPOSED = ("side_by_side.mp4",)  # pictures made of other clips, as `generate --compare` writes


def quality(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of clips, or one clip; results go there.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file, run first.")] = None,
    method: Annotated[str | None, typer.Option(help="Method, run first.")] = None,
    model: Annotated[str, typer.Option(help="Model to run first, as for generate.")] = "demo",
    prompt: Annotated[str | None, typer.Option(help="Prompt to run first.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to run first, one a line or VBench's JSON.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Clips per prompt; VBench makes 5.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first clip of each prompt.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of each clip.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    shard: Annotated[str, typer.Option(help="Only make part I of N, e.g. 0/4.")] = "0/1",
    processes: Annotated[int, typer.Option(help="Processes that share the prompts.")] = 1,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="Make the clips, measure nothing.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of clips of the same names, e.g. dense ones.")
    ] = None,
    dino: Annotated[Path | None, typer.Option(help="Folder of DINO weights.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of CLIP ViT-B/32 weights.")] = None,
    aesthetic: Annotated[
        Path | None, typer.Option(help="Folder of CLIP ViT-L/14 and LAION's linear head.")
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="Folder of AlexNet weights.")] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Also ask the official VBench package.")
    ] = False,
    official_python: Annotated[
        Path | None, typer.Option(help="Interpreter with a full VBench, for all dimensions.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Measure a folder of clips in VBench's seven dimensions; stand-ins are marked proxy.

    Example: dittools quality out/demo --json
    """
    from dittools.commands.measure import Distance, official_scores, prompt_score, quality_report
    from dittools.commands.suite import Suite, known_prompts, make_clips, prompt_list
    from dittools.commands.terminal import progress
    from dittools.pipelines.output import check_writable, write_text

    runs_first = plan is not None or method is not None or prompts is not None
    if folder is None:
        if not runs_first:
            raise InputError("nothing to measure", remedy="dittools quality FOLDER")
        folder = Path("out/quality")
    measure = Quality(Weights(dino, clip, aesthetic))  # wrong folders fail before any work
    distance = Distance(reference, lpips, dino, clip) if reference is not None else None
    with progress() as tell:
        if runs_first:
            check_writable(folder)
            make_clips(
                Suite(
                    model=model,
                    method=method,
                    plan=plan,
                    prompts=prompt_list(prompts, prompt, model),
                    per_prompt=per_prompt,
                    seed=seed,
                    steps=steps,
                    frames=frames,
                    height=height,
                    width=width,
                    device=device,
                    out=folder,
                ),
                shard,
                processes,
                tell,
            )
            if generate_only:
                return
        where = folder if folder.is_dir() else folder.parent
        paths = [path for path in find_clips(folder) if path.name not in COMPOSED]
        rows: dict[str, dict[str, Any]] = {}
        prompt_of = known_prompts(where)
        for number, path in enumerate(paths):
            found = read_clip(path)
            rows[path.name] = {
                "frames": len(found.pixels),
                "values": measure.add(found),
                "prompt_score": prompt_score(found, prompt_of.get(path.stem, path.stem)),
                "fidelity": distance(found) if distance is not None else None,
            }
            tell("measuring", number + 1, len(paths))
        dimensions = measure.result()
        said = official_scores(paths, official, official_python, device)
    report = quality_report(folder, rows, dimensions, said)
    write_text(where / "quality.json", json.dumps(report, indent=1, allow_nan=False))
    if as_json:
        sys.stdout.write(json.dumps(report, allow_nan=False) + "\n")
    else:
        _print(report, where / "quality.json")


def _print(report: dict[str, Any], path: Path) -> None:
    from dittools.commands.terminal import console

    table = Table("dimension", "VBench", "proxy", "official", "how")
    for name, row in report["dimensions"].items():
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        official = (report["official"] or {}).get(name, {})
        said = official.get("value")
        table.add_row(
            name.replace("_", " "),
            value if row["kind"] == "vbench" else "",
            value if row["kind"] == "proxy" else "",
            f"{said:.6f}" if said is not None else official.get("error", ""),
            row["how"] if row["kind"] != "not measured" else f"not measured: {row['how']}",
        )
    console.print(table)
    if report["prompt_score"] is not None:
        console.print(f"prompt check: {report['prompt_score']:.0%} of the clips match their prompt")
    for name, row in report["clips"].items():
        if row["fidelity"]:
            found = {k: v for k, v in row["fidelity"].items() if not k.startswith("frame_")}
            text = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if v is not None)
            console.print(f"{name}: {text}", markup=False, highlight=False)
    console.print(f"{len(report['clips'])} clips; report: {path}", markup=False, highlight=False)
