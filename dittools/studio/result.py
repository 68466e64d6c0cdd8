"""How one run looks on the page: player, numbers, report, downloads, and how to make it again."""

from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dittools.metrics.fidelity import db_words
from dittools.pipelines.report_attention import trouble
from dittools.pipelines.report_html import HEADINGS, rows, summary
from dittools.studio import html
from dittools.studio.generation import KIND
from dittools.studio.reproduce import command_line, python_snippet
from dittools.studio.runs import Run

LABELS = {
    "dense": "dense clip",
    "accelerated": "accelerated clip",
    "difference": "difference map",
    "report": "report.json",
    "page": "report page",
}


def file_url(path: Path | str) -> str:
    """Return the address a file of the run folder is served at."""
    return "gradio_api/file=" + quote(str(path))


def player(clips: dict[str, str], method: str, frames_per_second: int, scale: float = 0.0) -> str:
    """Return the player of the clips that are there.

    Args:
        clips: "dense", "accelerated" and "difference" -> path.
        method: what the accelerated clip is called.
        frames_per_second: of the clips.
        scale: difference that the brightest colour of the map stands for.
    """
    names = {"dense": "Dense", "accelerated": f"Accelerated: {method}", "difference": "Difference"}
    figures = "".join(_figure(key, clips.get(key), caption) for key, caption in names.items())
    views = (("side", "Side by side"), ("wipe", "Wipe"), ("difference", "Difference"))
    buttons = "".join(
        f'<button type="button" data-view="{key}" aria-pressed="{str(key == "side").lower()}"'
        f"{'' if _has(key, clips) else ' disabled'}>{name}</button>"
        for key, name in views
    )
    legend = (
        f'<p class="dt-legend" hidden>black: equal <i></i> bright: {scale:.0%} of the range or'
        " more apart</p>"
        if scale
        else ""
    )
    return (
        f'<dt-player data-fps="{frames_per_second}" data-view="side">'
        f'<div class="dt-views" role="group" aria-label="View">{buttons}</div>'
        f'<div class="dt-stage">{figures}</div>'
        '<label class="dt-wipe" hidden><span>Dense</span><input type="range" min="0" max="100" '
        'value="50" aria-label="Wipe: share of the picture that is dense"><span>Accelerated</span>'
        f"</label>{legend}"
        '<div class="dt-transport"><button type="button" data-do="play">Pause</button>'
        '<button type="button" data-do="back" aria-label="Previous frame">&#8249;</button>'
        '<button type="button" data-do="next" aria-label="Next frame">&#8250;</button>'
        '<input type="range" min="0" max="0" value="0" step="1" data-do="seek" aria-label="Frame">'
        '<output aria-live="off"></output><select data-do="rate" aria-label="Speed">'
        '<option value="0.25">1/4 speed</option><option value="0.5">1/2 speed</option>'
        '<option value="1" selected>full speed</option></select></div></dt-player>'
    )


def _has(view: str, clips: dict[str, str]) -> bool:
    needed = {"side": ("dense",), "wipe": ("dense", "accelerated"), "difference": ("difference",)}
    return all(name in clips for name in needed[view])


def _figure(key: str, path: str | None, caption: str) -> str:
    if path is None:
        if key == "difference":
            return ""
        media = '<div class="dt-pending">is being made</div>'
    elif path.endswith(".png"):
        media = f'<img src="{escape(file_url(path))}" alt="{escape(caption)}">'
    else:
        media = (
            f'<video src="{escape(file_url(path))}" muted playsinline preload="auto" '
            f'aria-label="{escape(caption)}"></video>'
        )
    return f'<figure data-clip="{key}">{media}<figcaption>{escape(caption)}</figcaption></figure>'


def forecast_card(found: dict[str, Any]) -> str:
    """Return what the plan promises, in one box."""
    if "error" in found:
        return html.notice(f"No forecast: {found['error']}")
    ratio, dense = found["speedup_as_given"], found["dense_seconds"]  # the run takes it as it is
    times = f"{dense:.1f} s dense, {dense / ratio:.1f} s accelerated" if dense is not None else ""
    tiles = [
        ("Forecast", f"{ratio:.2f}x", times or "end to end"),
        ("Density", f"{_mean_density(found):.2f}", "share of query-key pairs kept"),
        (
            "Attention",
            f"{found['attention_share']:.0%}",
            f"of a dense run, so {found['bound']:.2f}x at the very best",
        ),
        ("Tokens", f"{found['tokens']:,}", "per clip"),
    ]
    notes = []
    if found["losing"]:
        notes.append(
            f"Sparse is slower than dense in layers {_list(found['losing'])}. With them left "
            f"dense it would be {found['speedup']:.2f}x: dittools forecast --out writes that plan."
        )
    notes += [f"Only the run will tell: {text}." for text in found["unknown"]]
    return _tiles(tiles, "dt-forecast") + "".join(html.notice(note) for note in notes)


def _mean_density(found: dict[str, Any]) -> float:
    """Return the density of a run in which no layer is left dense."""
    return sum(float(layer["density"]) for layer in found["layers"]) / len(found["layers"])


def numbers(report: dict[str, Any], floors_pending: bool = False) -> str:
    """Return tiles, table and report text of a comparison."""
    fidelity, floors = report["fidelity"], report["floors"]
    floor = floors.get("random_blocks") or floors.get("other_seed")
    against = f"floor {db_words(floor['psnr_db'])}" if floor else "to the dense clip"
    ssim = f"floor {floor['ssim']:.3f}" if floor else "to the dense clip"
    dense, fast = report["dense"]["seconds"], report["accelerated"]["seconds"]
    tiles = [
        ("Speed-up", f"{report['speedup']:.2f}x", f"{dense:.2f} s dense, {fast:.2f} s accelerated"),
        ("Density", f"{report['density']:.2f}", "share of query-key pairs kept"),
        ("PSNR", db_words(fidelity["psnr_db"]), against),
        ("SSIM", f"{fidelity['ssim']:.3f}", ssim),
    ]
    listed = rows(report)
    soft = [n for n, row in enumerate(listed) if row[0].startswith("floor")]
    pending = html.notice("The floors are still being measured.") if floors_pending else ""
    return (
        _tiles(tiles)
        + html.table(HEADINGS, listed, soft)
        + pending
        + f"<p>{escape(summary(report))}</p>"
        + report_text(report)
    )


def report_text(report: dict[str, Any]) -> str:
    """Return what the attachment reports: settings, backends, and what ran dense and why."""
    found = report["accelerated"]["report"]
    calls = found["calls"]
    lines = [
        ("Settings", found["preset"]),
        ("Model", found["family"]),
        ("Calls", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in calls.items())),
        ("Backend", ", ".join(found["backends"]) or "dense only"),
    ]
    if found.get("error") is not None:
        lines.append(("Error", f"{found['error']:.3f} of dense attention, by sampled rows"))
    lines += trouble(found)
    if not found["fallbacks"]:
        lines.append(("Ran dense", "only what the plan's schedule keeps dense"))
    lines += [("Note", note) for note in found["notes"]]
    for name, score in (report["prompt_score"] or {}).items():
        wrong = [part for part, right in score.items() if right is False and part != "all"]
        lines.append((f"Prompt, {name}", "matches" if not wrong else f"misses: {', '.join(wrong)}"))
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines)
    return f'<dl class="dt-facts">{body}</dl>'


def downloads(run: Run) -> str:
    """Return links to all files of a run."""
    links = "".join(
        f'<a href="{escape(file_url(run.folder / file))}" download="{escape(f"{run.id}-{file}")}">'
        f"{escape(LABELS.get(name, name))}</a>"
        for name, file in run.files.items()
    )
    return f'<h3>Download</h3><div class="dt-links">{links}</div>'


def extras(run: Run) -> str:
    """Return the downloads of a run and the lines that make it again."""
    plan = run.path("plan") if run.facts["from_plan"] else None
    return (
        f"{downloads(run)}"
        '<details class="dt-again"><summary>Reproduce this run</summary>'
        f"{_code('Command line', command_line(run.facts, plan))}"
        f"{_code('Python', python_snippet(run.facts, plan))}</details>"
    )


def clips_of(run: Run) -> dict[str, str]:
    """Return the paths the player takes."""
    found = {name: run.path(name) for name in ("dense", "accelerated", "difference")}
    return {name: str(path) for name, path in found.items() if path is not None}


def view(run: Run) -> tuple[str, str]:
    """Return player and details of a generation.

    Raises:
        KeyError: the run is of another kind.
    """
    facts = run.facts
    assert run.kind == KIND
    shown = player(
        clips_of(run),
        facts["report"]["method"],
        facts["frames_per_second"],
        facts["difference_scale"],
    )
    return shown, numbers(facts["report"]) + extras(run)


def _code(title: str, text: str) -> str:
    return (
        f'<div class="dt-code"><div><b>{escape(title)}</b><button type="button" class="dt-copy">'
        f'Copy</button></div><pre tabindex="0"><code>{escape(text)}</code></pre></div>'
    )


def _tiles(tiles: list[tuple[str, str, str]], kind: str = "") -> str:
    body = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<div class="dt-tiles {kind}">{body}</div>'


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)
