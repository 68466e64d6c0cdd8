"""Several measurements in one page that needs nothing but itself."""

import base64
import io
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from dittools.errors import InputError
from dittools.metrics.clips import Clip, Pixels, as_float, read_clip, same_shape
from dittools.metrics.fidelity import frame_psnr, worst_second
from dittools.metrics.results import reasons_not_comparable

Document = tuple[Path, dict[str, Any]]
COLOURS = ("#2a7", "#c73", "#57c", "#a5a", "#883", "#577")
FASTEST = 1000.0  # speed-up the plot has room for
SHOWN_FRAMES = 6  # of the worst second

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dittools: comparison</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --warn: #c73 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left } tr.floor { background: var(--soft) }
svg { width: 100%; height: auto } figure { margin: 0 } .note { opacity: .8 }
.warning { border-left: 4px solid var(--warn); padding: .5rem 1rem; background: var(--soft) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem }
.wipe { position: relative } .wipe video, .wipe img { width: 100%; display: block }
.wipe .over { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at, 50%)) }
.wipe .edge { position: absolute; top: 0; bottom: 0; left: var(--at, 50%); width: 2px;
background: #fff8; pointer-events: none } input[type=range] { width: 100% }
img { max-width: 100%; image-rendering: pixelated }
</style></head><body>
<h1>Comparison</h1>
$warnings
<h2>Speed and quality</h2>
$scatter
<p class="note">Right is faster, up is closer to the dense clip of the same seed. Dashed lines are
the floors of the first file: what another seed, or random blocks at the same density, would
score.</p>
<h2>Times</h2>
<div class="wide">$times</div>
<p class="note">Milliseconds, median (20th to 80th percentile). Bound is Amdahl's: at the measured
density / if attention took no time at all. Limit is the least time for the counted FLOPs and bytes
at the rates measured on the same machine.</p>
$parts
<h2>Distance to dense</h2>
<div class="wide">$distances</div>
$pairs
<h2>Measured with</h2>
<div class="wide">$provenance</div>
<script>
for (const wipe of document.querySelectorAll('.wipe')) {
  const slider = wipe.parentElement.querySelector('input');
  const move = () => wipe.style.setProperty('--at', slider.value + '%');
  slider.addEventListener('input', move); move();
  const [under, over] = wipe.querySelectorAll('video');
  if (under && over) {
    const align = () => { if (Math.abs(over.currentTime - under.currentTime) > 0.04)
      over.currentTime = under.currentTime; };
    under.addEventListener('timeupdate', align);
    under.addEventListener('play', () => over.play());
    under.addEventListener('pause', () => { over.pause(); align(); });
  }
}
</script>
</body></html>
""")


def compare_page(documents: list[Document]) -> str:
    """Return the HTML of one or more results; clips are embedded, every text is escaped.

    Args:
        documents: path and content of each results file; the first is what the rest is held to.
    Raises:
        InputError: a clip named in a file is damaged, or differs in size from its dense one.
    """
    return _PAGE.substitute(
        warnings=_warnings(documents),
        scatter=scatter(documents),
        times="".join(_times(path, document) for path, document in documents),
        parts="".join(
            f"<h3>{escape(_label(path))}</h3>{parts_plot(document['cases'])}"
            for path, document in documents
        ),
        distances=_distances(documents),
        pairs="".join(_pairs(path, document) for path, document in documents),
        provenance=_provenance(documents),
    )


def scatter(documents: list[Document]) -> str:
    """Return an SVG: speed-up against PSNR, one colour per file, floors dashed."""
    points = [
        (case["speedup"]["median"], case["fidelity"]["psnr_db"], case["name"], number)
        for number, (_, document) in enumerate(documents)
        for case in document["cases"]
        if case["fidelity"]
    ]
    floors = documents[0][1].get("floors", {})
    heights = [p[1] for p in points] + [floor["psnr_db"] for floor in floors.values()]
    top = max([10.0, *(min(h, 60.0) for h in heights)]) * 1.15
    right = max([1.2, *(min(p[0], FASTEST) for p in points)]) * 1.15
    width, height, left, bottom = 640, 320, 48, 36

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - 90) * min(x, right) / right,
            (height - bottom) * (1 - min(y, top) / top) + 8,
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="speed and quality">']
    for level in range(0, int(top) + 1, 10):
        y = place(0, level)[1]
        parts.append(_line(left, width, y, y, "#8884") + _words(8, y + 4, str(level)))
    x = place(1, 0)[0]
    parts.append(_line(x, x, 8, height - bottom + 8, "#8888") + _words(x + 3, 18, "dense speed"))
    for tick in range(0, int(right) + 1, 1 + int(right) // 10):
        parts.append(_words(place(tick, 0)[0] - 6, height - 12, f"{tick}x"))
    for name, floor in floors.items():
        y = place(0, floor["psnr_db"])[1]
        parts.append(_line(left, width, y, y, "#888", dashed=True))
        parts.append(_words(left + 4, y - 3, name, size=10))
    for speed, quality, name, number in points:
        x, y = place(speed, quality)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(_words(x + 8, y + 4, name, colour))
    parts.append(_words(width - 86, height - 12, "speed-up"))
    parts.append(_words(8, 12, "PSNR, dB", size=10))
    return "".join(parts) + "</svg>"


def parts_plot(cases: list[dict[str, Any]]) -> str:
    """Return an SVG: one stacked bar per case, from attention to everything else."""
    names = list(cases[0]["parts_ms"])
    totals = [sum(part["median"] for part in case["parts_ms"].values()) for case in cases]
    width, row, left = 640, 26, 130
    scale = (width - left - 70) / max(max(totals), 1e-9)
    height = row * len(cases) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="time by part" font-family="system-ui, sans-serif">'
    ]
    for number, (case, total) in enumerate(zip(cases, totals, strict=True)):
        y, x = number * row + 4, float(left)
        parts.append(_words(4, y + 14, case["name"]))
        for index, name in enumerate(names):
            length = case["parts_ms"][name]["median"] * scale
            colour = COLOURS[index % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="18" fill="{colour}">'
                f"<title>{escape(name)}: {case['parts_ms'][name]['median']:.1f} ms</title></rect>"
            )
            x += length
        parts.append(_words(x + 4, y + 14, f"{total:.0f} ms"))
    x = 4.0
    for index, name in enumerate(names):
        y = row * len(cases) + 26
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{x:.0f}" y="{y - 9}" width="9" height="9" fill="{colour}"/>')
        parts.append(_words(x + 12, y, name, size=10))
        x += 24 + 6.2 * len(name)
    return "".join(parts) + "</svg>"


def heat_map(dense: Pixels, other: Pixels) -> tuple[Pixels, float]:
    """Return the mean absolute difference over the frames as a picture, and its largest value.

    Black is no difference, then red, yellow; white is the largest of the picture.
    """
    error = np.abs(dense.astype(np.float32) - other.astype(np.float32)).mean(axis=(0, 3))
    top = float(error.max())
    level = 3 * error / top if top > 0 else error
    picture = np.stack([np.clip(level - channel, 0, 1) for channel in range(3)], axis=-1)
    pixels: Pixels = (255 * picture).astype(np.uint8)
    return pixels, top


def _warnings(documents: list[Document]) -> str:
    found = ""
    for path, document in documents[1:]:
        reasons = reasons_not_comparable(documents[0][1], document)
        if reasons:
            items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
            names = f"{escape(_label(documents[0][0]))} and {escape(_label(path))}"
            found += f'<div class="warning"><b>{names} are not comparable</b><ul>{items}</ul></div>'
    return found


def _times(path: Path, document: dict[str, Any]) -> str:
    from dittools.commands.bench import HEADINGS, table_rows

    return _table(HEADINGS, table_rows(document), caption=_label(path))


def _distances(documents: list[Document]) -> str:
    headings = ("", "density", "PSNR dB", "SSIM", "MS-SSIM", "worst frame dB", "prompt")
    rows, floors = [], set()
    for path, document in documents:
        for case in document["cases"]:
            if case["fidelity"]:
                rows.append(_distance(f"{_label(path)}: {case['name']}", case["fidelity"], case))
        for name, floor in document.get("floors", {}).items():
            floors.add(len(rows))
            rows.append(_distance(f"{_label(path)}: floor, {name}", floor, floor))
    return _table(headings, rows, shaded=floors)


def _distance(name: str, found: dict[str, Any], case: dict[str, Any]) -> tuple[str, ...]:
    score, density, ms_ssim = case.get("prompt_score"), case.get("density"), found.get("ms_ssim")
    return (
        name,
        "" if density is None else f"{density:.2f}",
        f"{found['psnr_db']:.1f}",
        f"{found['ssim']:.3f}",
        "" if ms_ssim is None else f"{ms_ssim:.3f}",
        f"{min(found['frame_psnr_db']):.1f}",
        "" if not score else ("matches" if score["all"] else "misses"),
    )


def _pairs(path: Path, document: dict[str, Any]) -> str:
    """Return a wipe, a heat map and the worst second for every accelerated clip of a file."""
    found = {case["name"]: path.parent / case["clip"] for case in document["cases"]}
    if "dense" not in found or not found["dense"].is_file():
        return f"<h2>{escape(_label(path))}</h2><p>The dense clip is not beside the file.</p>"
    dense = read_clip(found["dense"])
    html = ""
    for name, clip in found.items():
        if name == "dense":
            continue
        title = f"<h2>{escape(_label(path))}: dense and {escape(name)}</h2>"
        if not clip.is_file():
            html += title + "<p>The clip is not beside the file.</p>"
            continue
        other = read_clip(clip)
        same_shape([dense, other])
        html += title + _pair(name, dense, other)
    return html


def _pair(name: str, dense: Clip, other: Clip) -> str:
    picture, top = heat_map(dense.pixels, other.pixels)
    curve = frame_psnr(as_float(dense.pixels), as_float(other.pixels))
    first, last = worst_second(curve, dense.fps or 1)
    mean = float(np.mean(curve[first : last + 1]))
    chosen = np.unique(np.linspace(first, last, SHOWN_FRAMES).round().astype(int))
    strip = np.concatenate(
        [np.concatenate(list(clip.pixels[chosen]), axis=1) for clip in (dense, other)], axis=0
    )
    return (
        '<div class="pair"><figure>'
        f'<div class="wipe">{_media(dense.path, "")}{_media(other.path, "over")}'
        '<div class="edge"></div></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="wipe">'
        f"<figcaption>left dense, right {escape(name)}; same seed</figcaption></figure>"
        f"<figure>{_image(picture)}<figcaption>mean difference, white is {top:.1f} of 255"
        "</figcaption></figure></div>"
        f"<h3>Worst second: frames {first} to {last}, {mean:.1f} dB</h3>"
        f"<figure>{_image(strip)}<figcaption>above dense, below {escape(name)}"
        "</figcaption></figure>"
    )


def _provenance(documents: list[Document]) -> str:
    headings = ("", *(_label(path) for path, _ in documents))
    keys: list[tuple[str, str]] = []
    for _, document in documents:
        for part in ("run", "hardware", "versions", "git"):
            keys += [(part, key) for key in document[part] if (part, key) not in keys]
    rows = [
        (f"{part} {key}", *(str(document[part].get(key, "")) for _, document in documents))
        for part, key in keys
    ]
    plans = [
        ", ".join(f"{case['name']} {case['plan_checksum']}" for case in document["cases"])
        for _, document in documents
    ]
    return _table(headings, [*rows, ("plan checksums", *plans)])


def _table(
    headings: tuple[str, ...],
    rows: list[tuple[str, ...]],
    *,
    caption: str = "",
    shaded: set[int] | None = None,
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = ""
    for number, row in enumerate(rows):
        kind = ' class="floor"' if shaded and number in shaded else ""
        body += f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<tr>{head}</tr>{body}</table>"


def _media(path: Path, kind: str) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(f"cannot read {path}", got=error.strerror or str(error)) from error
    if path.suffix == ".png":
        return f'<img class="{kind}" alt="" src="data:image/png;base64,{data}">'
    attributes = "muted loop playsinline autoplay" + ("" if kind else " controls")
    return f'<video class="{kind}" src="data:video/mp4;base64,{data}" {attributes}></video>'


def _image(pixels: Pixels) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _label(path: Path) -> str:
    return path.parent.name + "/" + path.name if path.name == "results.json" else path.name


def _line(x1: float, x2: float, y1: float, y2: float, colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'
    )


def _words(x: float, y: float, text: str, colour: str = "currentColor", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
