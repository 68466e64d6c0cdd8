"""The command line: one clear line on bad input, exit code 2, never a traceback."""

import json
import os
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dittools.commands import (
    bench,
    calibrate,
    forecast,
    freeswim,
    highres,
    inspect,
    quality,
    search,
)
from dittools.commands.terminal import (
    Json,
    console,
    count_or_share,
    errors,
    first_line,
    guidance_of,
    pairs,
    progress,
)
from dittools.errors import DitToolsError, InputError

app = typer.Typer(
    help="Training-free acceleration of diffusers image and video transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    wanted = sys.argv[1:] if arguments is None else arguments
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # one clear line, not their many
        os.environ.setdefault(name, "error")
    try:
        code = app(wanted, standalone_mode=False, prog_name="dittools")
        if code == 130:  # the command-line library turned Ctrl-C into an exit code
            _fail("interrupted; no half-written file was left", wanted, 130)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        _fail("interrupted; no half-written file was left", wanted, 130)
    except DitToolsError as error:
        _fail(str(error), wanted, 2)
    except Exception as error:  # the last line of defence: a sentence, no traceback
        if type(error).__name__ == "Abort":  # how the command-line library reports Ctrl-C
            _fail("interrupted; no half-written file was left", wanted, 130)
        usage = getattr(error, "format_message", None)
        if usage is not None:  # wrong option or argument
            _fail(f"{usage()} (see dittools {' '.join(wanted[:1])} --help)", wanted, 2)
        if os.environ.get("DITTOOLS_DEBUG"):
            raise
        text = " ".join(str(error).split()) or "no message"
        _fail(f"{type(error).__name__}: {text} (DITTOOLS_DEBUG=1 shows where)", wanted, 1)


def _fail(text: str, arguments: list[str], code: int) -> None:
    if "--json" in arguments:
        sys.stdout.write(json.dumps({"error": text}) + "\n")
    errors.print(f"error: {text}", style="red", markup=False, highlight=False)
    sys.exit(code)


@app.command()
def generate(
    model: Annotated[
        str, typer.Option(help="demo, tiny/<family>, a diffusers folder or a hub id.")
    ] = "demo",
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method name; `dittools methods` lists them. The demo defaults to a searched plan."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file, instead of a method.")] = None,
    param: Annotated[
        list[str] | None, typer.Option("--set", help="Method parameter, e.g. --set decay=0.5.")
    ] = None,
    dense_steps: Annotated[
        float | None, typer.Option(help="First steps kept dense: a count, or a share below 1.")
    ] = None,
    dense_layers: Annotated[int | None, typer.Option(help="First layers kept dense.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip; 1 for an image.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    guidance_heads: Annotated[
        str | None,
        typer.Option(help="HeadHunter: heads to perturb, e.g. L0H1,L3H2, or a plan that has some."),
    ] = None,
    guidance_weight: Annotated[
        float | None, typer.Option(help="HeadHunter: weight, 3 unless the plan says.")
    ] = None,
    guidance_u: Annotated[
        float | None, typer.Option(help="HeadHunter: strength 0 to 1, 1 unless the plan says.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also dense and the two floors, and a report.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed repeats with --compare.")] = 3,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    recorder: Annotated[
        bool, typer.Option(help="Watch the run: its error, and heads in trouble run dense.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line: a clip each, resumable.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="With --prompts: clips of each.")] = 1,
    engine: Annotated[str, typer.Option(help="With --prompts: local or ray.")] = "local",
    workers: Annotated[int | None, typer.Option(help="With --engine ray: actors.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/generate"),
    as_json: Json = False,
) -> None:
    """Generate a clip or an image, accelerated, and report what it saved.

    Example: dittools generate --prompt "a red circle moving left" --method gna --compare
    """
    from dittools.pipelines.session import Request, run

    request = Request(
        model=model,
        prompt=prompt,
        negative_prompt=negative_prompt,
        method=method,
        plan=plan,
        params=pairs(param or []),
        dense_steps=count_or_share(dense_steps),
        dense_layers=dense_layers,
        seed=seed,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        perturb=guidance_of(guidance_heads, guidance_weight, guidance_u),
        compare=compare,
        repeats=repeats,
        backend=backend,
        recorder=recorder,
        dtype=dtype,
        device=device,
        out=out,
    )
    if prompts is not None:
        _generate_many(request, prompts, per_prompt, engine, workers, as_json)
        return
    with progress() as step:
        result = run(request, step, lambda note: errors.print(note, markup=False, highlight=False))
    if as_json:
        sys.stdout.write(json.dumps(result.report) + "\n")
        return
    _print_result(result.report, result.files, compare)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods, their parameters and defaults.

    Example: dittools methods --json
    """
    from dittools.methods import METHODS

    table = Table("method", "what it does", "parameters (default)")
    listing: dict[str, Any] = {}
    for name, kind in METHODS.items():
        described = [(f.name, f.default, f.metadata.get("help", "")) for f in fields(kind)]
        listing[name] = {
            "summary": first_line(kind),
            "parameters": {n: {"default": d, "help": h} for n, d, h in described},
        }
        table.add_row(name, first_line(kind), ", ".join(f"{n}={d}" for n, d, _ in described))
    if as_json:
        sys.stdout.write(json.dumps(listing, default=str) + "\n")
    else:
        console.print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, devices, kernels and the diffusers contract; say what is slow and why.

    Example: dittools doctor
    """
    from dittools.doctor import examine

    checks = examine()
    if as_json:
        sys.stdout.write(json.dumps([check.to_dict() for check in checks]) + "\n")
    else:
        table = Table("check", "state", "finding", "what to do")
        for check in checks:
            table.add_row(check.name, check.state, check.finding, check.remedy)
        console.print(table)
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def _generate_many(
    request: Any, prompts: Path, per_prompt: int, engine: str, workers: int | None, as_json: bool
) -> None:
    from dittools.pipelines.batch_run import run_batch
    from dittools.pipelines.ranks import finish, is_main

    try:
        with progress() as tell:
            report = run_batch(
                request, prompts, tell, per_prompt=per_prompt, engine=engine, workers=workers
            )
        if as_json and is_main():
            sys.stdout.write(json.dumps(report) + "\n")
    finally:
        finish()
    for failure in report["failures"]:
        text = f"failed {failure['attempts']} times: {failure['file']}: {failure['error']}"
        errors.print(text, markup=False, highlight=False)
    if not as_json:
        text = f"{report['done']} of {report['wanted']} clips are in {request.out}"
        console.print(text, markup=False, highlight=False)
    if report["failures"]:
        raise typer.Exit(1)


@app.command()
def studio(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's needs --auth.")
    ] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Open a public link; needs --auth.")
    ] = False,
    auth: Annotated[str | None, typer.Option(help="Login, as user:password.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the history.")] = Path("out/studio"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Serve the studio: generate, compare, search and measure in the browser.

    Example: dittools studio --port 7860
    """
    if find_spec("gradio") is None:
        raise InputError("the studio needs gradio", remedy="pip install 'dittools[app]'")
    from dittools.studio import StudioSettings, launch

    launch(StudioSettings(runs, host, port, share, auth, device, dtype))


def _print_result(report: dict[str, Any], files: dict[str, Path], compared: bool) -> None:
    from dittools.pipelines.report_attention import trouble
    from dittools.pipelines.report_html import HEADINGS, rows, summary

    if compared:
        table = Table(*HEADINGS)
        for row in rows(report):
            table.add_row(*row)
        console.print(table)
        console.print(summary(report), markup=False, highlight=False)
        for name, text in trouble(report["accelerated"]["report"]):
            console.print(f"{name.lower()}: {text}", markup=False, highlight=False)
        error = report["accelerated"]["report"]["error"]
        if error is not None:
            console.print(f"attention error: {error:.3f} of dense", markup=False, highlight=False)
        for name, score in (report["prompt_score"] or {}).items():
            wrong = [part for part, right in score.items() if right is False and part != "all"]
            verdict = "matches the prompt" if not wrong else f"misses: {', '.join(wrong)}"
            console.print(f"prompt check, {name}: {verdict}", markup=False, highlight=False)
    else:
        console.print(report["accelerated"]["text"], markup=False, highlight=False)
    for name, path in files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)


app.command()(quality.quality)
app.add_typer(bench.app, name="bench")
app.command()(search.search)
app.command()(calibrate.calibrate)
app.command()(forecast.forecast)
app.command()(inspect.inspect)
app.command()(freeswim.freeswim)
app.command()(highres.highres)
