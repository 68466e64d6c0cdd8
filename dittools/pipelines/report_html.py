"""One comparison as a page that needs nothing but itself."""

import base64
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dittools.metrics.fidelity import db_words
from dittools.pipelines.report_attention import attention

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dittools: $prompt</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem }
figure { margin: 0 } video, img { width: 100%; border-radius: 6px; image-rendering: pixelated }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto }
caption { text-align: left; padding: .3rem 0 }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left } tr.floor { background: var(--soft) }
svg { width: 100%; height: auto } dl { display: grid; grid-template-columns: max-content 1fr;
gap: .2rem 1rem } dt { opacity: .7 } dd { margin: 0 } .note { opacity: .8 }
</style></head><body>
<h1>$prompt</h1>
<p>$summary</p>
<div class="clips">$clips</div>
<h2>Numbers</h2>
$table
<p class="note">PSNR and SSIM are against the dense clip of the same seed. The floors tell what the
numbers mean: a clip from another seed, and random blocks kept at the same density.</p>
<h2>PSNR per frame</h2>
$plot
<h2>Attention</h2>
$attention
<h2>Settings</h2>
<dl>$facts</dl>
</body></html>
""")


def page(report: dict[str, Any], clips: dict[str, Path]) -> str:
    """Return the HTML of one report; clips are embedded, every text is escaped.

    Args:
        report: what `Comparison.to_dict` returns.
        clips: caption -> mp4 or png file.
    """
    figures = "".join(
        f"<figure>{_media(path)}<figcaption>{escape(name)}</figcaption></figure>"
        for name, path in clips.items()
    )
    facts = {**report["settings"], **report["environment"], "model": report["model"]}
    return _PAGE.substitute(
        prompt=escape(str(report["settings"]["prompt"])),
        summary=escape(summary(report)),
        clips=figures,
        table=_table(report),
        plot=_plot(report),
        attention=attention(report["accelerated"]["report"]),
        facts="".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in facts.items()
            if value not in (None, "")
        ),
    )


def summary(report: dict[str, Any]) -> str:
    """Return one paragraph: how much was saved, what it cost, what bounds it."""
    share, bound = report["attention_share"], report["speedup_bound"]
    return (
        f"{report['method']} took {report['accelerated']['seconds']:.2f} s, dense "
        f"{report['dense']['seconds']:.2f} s: {report['speedup']:.2f}x end to end at density "
        f"{report['density']:.2f}. Attention is {share:.0%} of the dense run, which bounds any "
        f"gain from sparse attention at {bound:.2f}x. PSNR to dense "
        f"{db_words(report['fidelity']['psnr_db'])}, SSIM {report['fidelity']['ssim']:.3f}."
    )


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows: name, seconds, attention seconds, density, PSNR, SSIM."""
    dense, fast = report["dense"], report["accelerated"]
    floors = report["floors"]
    table = [
        ("dense", dense["seconds"], dense["attention_seconds"], 1.0, None, None),
        (
            report["method"],
            fast["seconds"],
            fast["attention_seconds"],
            report["density"],
            report["fidelity"]["psnr_db"],
            report["fidelity"]["ssim"],
        ),
    ]
    for name, key in (
        ("floor: another seed", "other_seed"),
        ("floor: random blocks", "random_blocks"),
    ):
        if key not in floors:
            continue
        floor = floors[key]
        density = floor.get("density", 1.0)
        table.append((name, None, None, density, floor["psnr_db"], floor["ssim"]))
    forms = ("{}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f}", "{:.3f}")
    return [
        tuple("" if v is None else form.format(v) for form, v in zip(forms, row, strict=True))
        for row in table
    ]


HEADINGS = ("", "end to end, s", "in attention, s", "density", "PSNR, dB", "SSIM")


def _table(report: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADINGS)
    body = ""
    for row in rows(report):
        kind = ' class="floor"' if row[0].startswith("floor") else ""
        body += f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _media(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    if path.suffix == ".png":
        return f'<img alt="" src="data:image/png;base64,{data}">'
    source = f"data:video/mp4;base64,{data}"
    return f'<video src="{source}" autoplay loop muted playsinline controls></video>'


def _plot(report: dict[str, Any]) -> str:
    """Return an inline SVG: one line for the result, one for each floor."""
    lines = {report["method"]: report["fidelity"]["frame_psnr_db"]}
    for name, key in (("another seed", "other_seed"), ("random blocks", "random_blocks")):
        if key in report["floors"]:
            lines[name] = report["floors"][key]["frame_psnr_db"]
    top = max(10.0, *(min(v, 60.0) for values in lines.values() for v in values)) * 1.1
    width, height, left = 640, 220, 40
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="PSNR per frame">']
    for level in range(0, int(top) + 1, 10):
        y = height - 20 - (height - 40) * level / top
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(
            f'<text x="4" y="{y + 4:.1f}" font-size="12" fill="currentColor">{level}</text>'
        )
    taken: list[float] = []
    for (name, values), colour in zip(lines.items(), ("#2a7", "#c73", "#57c"), strict=False):
        step = (width - left - 130) / max(1, len(values) - 1)
        places = [
            (left + i * step, height - 20 - (height - 40) * min(v, top) / top)
            for i, v in enumerate(values)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        x, y = places[-1]
        while any(abs(y - other) < 14 for other in taken):  # labels must not lie on each other
            y += 14
        taken.append(y)
        place = f'x="{x + 6:.1f}" y="{y + 4:.1f}" font-size="12" fill="{colour}"'
        parts.append(f"<text {place}>{escape(name)}</text>")
    return "".join(parts) + "</svg>"
