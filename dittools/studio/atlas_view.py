"""The head atlas as HTML: a grid of heads to choose from, and one head with its candidates."""

import base64
import io
import re
from functools import lru_cache
from html import escape

import numpy as np

from dittools.studio.atlas_edit import AtlasEdit

SHOWN = 14  # candidates listed at once, the best first; the rest open on request
ABOUT = {
    "local": "looks at its neighbours in space and time",
    "diagonal": "looks at what lies within half a frame in raster order",
    "stripe": "looks at the same place in every frame",
    "frame": "looks at its own frame",
    "row": "looks along its row",
    "column": "looks along its column",
    "sink": "looks at the first frame",
    "spread": "looks everywhere",
}


def range_name(edit: AtlasEdit, part: int) -> str:
    """Return a step range as people say it."""
    edges, steps = edit.found["ranges"], edit.found["range_steps"][part]
    plural = "step" if steps == 1 else "steps"
    return f"{100 * edges[part]:.0f} to {100 * edges[part + 1]:.0f} % of the run ({steps} {plural})"


def grid(edit: AtlasEdit, part: int, opened: tuple[int, int] | None) -> str:
    """Return the heads as buttons, a layer a row; arrow keys move between them."""
    found, rows, edited = edit.found, [], edit.edited
    columns = "".join(f'<th scope="col">head {h}</th>' for h in range(found["heads"]))
    for layer in range(found["layers"]):
        cells = []
        for head in range(found["heads"]):
            place = edit.index(layer, head, part)
            cell = found["cells"][place]
            methods = [found["candidates"][c]["method"] for c in edit.choice[place]]
            method = " / ".join(dict.fromkeys(methods))
            changed = " dt-edited" if place in edited else ""
            label = f"layer {layer}, head {head}: {cell['class']}, runs {method}"
            cells.append(
                f'<td><button type="button" class="dt-head-cell{changed}" data-layer="{layer}" '
                f'data-head="{head}" aria-pressed="{str((layer, head) == opened).lower()}" '
                f'aria-label="{escape(label)}">{picture(cell["map"], "")}'
                f"<b>{escape(cell['class'])}</b><span>{escape(method)}</span></button></td>"
            )
        rows.append(f'<tr><th scope="row">layer {layer}</th>{"".join(cells)}</tr>')
    return (
        '<div class="dt-scroll dt-atlas" role="region" aria-label="head atlas"><table>'
        f"<thead><tr><td></td>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def head(edit: AtlasEdit, part: int, opened: tuple[int, int]) -> str:
    """Return one head: its map, the mass in each band, and the candidates with their errors."""
    found = edit.found
    layer, number = opened
    place = edit.index(layer, number, part)
    cell = found["cells"][place]
    bands = "".join(
        _band(name, held, share)
        for name, held, share in zip(found["bands"], cell["bands"], found["uniform"], strict=True)
    )
    return (
        f'<section class="dt-head" aria-label="layer {layer}, head {number}">'
        f"<h3>Layer {layer}, head {number}: {escape(cell['class'])}</h3>"
        f'<p class="dt-quiet">It {escape(ABOUT.get(cell["class"], "has no name"))}; steps '
        f"{escape(range_name(edit, part))}.</p>"
        f'<div class="dt-head-top"><figure>{picture(cell["map"], "attention map")}'
        "<figcaption>queries down, keys across</figcaption></figure>"
        f'<table class="dt-bands"><caption>mass per band, a line where uniform attention would be'
        f"</caption>{bands}</table></div>{_candidates(edit, place)}</section>"
    )


def _band(name: str, held: float, uniform: float) -> str:
    return (
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>'
        f'<span class="dt-bar" style="--held:{held:.4f};--uniform:{uniform:.4f}"></span></td>'
        f"<td>{100 * held:.0f} %</td></tr>"
    )


def _candidates(edit: AtlasEdit, place: int) -> str:
    """Return the candidates of a head, the least error first; dense and the chosen one on top."""
    cell, known, chosen = edit.found["cells"][place], edit.found["candidates"], edit.choice[place]
    errors = cell["error"]
    order = sorted(
        range(len(known)),
        key=lambda i: (errors[i] is None, errors[i] if errors[i] is not None else 0.0, i),
    )
    rows = {i: _candidate(edit, place, i) for i in order}
    top = list(dict.fromkeys([*chosen, *order]))[:SHOWN]
    rest = [i for i in order if i not in top]
    head = (
        '<thead><tr><th scope="col">choice</th><th scope="col">error</th>'
        '<th scope="col">density</th><th scope="col">candidate</th>'
        '<th scope="col">per branch</th></tr></thead>'
    )
    more = ""
    if rest:
        inner = "".join(rows[i] for i in rest)
        more = (
            f"<details><summary>{len(rest)} more with larger errors</summary>"
            f'<div class="dt-scroll"><table class="dt-candidates">{head}<tbody>{inner}</tbody>'
            "</table></div></details>"
        )
    shown = "".join(rows[i] for i in top)
    return (
        '<div class="dt-scroll" tabindex="0" role="region" aria-label="candidates">'
        f'<table class="dt-candidates">{head}<tbody>{shown}</tbody></table></div>{more}'
        '<p class="dt-quiet">The error is relative to what the head adds to the picture when it '
        "runs dense, 0 is no difference.</p>"
    )


def _candidate(edit: AtlasEdit, place: int, number: int) -> str:
    entry, cell = edit.found["candidates"][number], edit.found["cells"][place]
    error, chosen = cell["error"][number], edit.choice[place]
    reason, is_chosen = edit.refusal(number, [place]), number in chosen
    if chosen == (number, number):
        button = '<b class="dt-chosen">chosen</b>'
    elif reason:
        button = f'<span class="dt-quiet" title="{escape(reason)}">not here</span>'
    else:
        button = (
            f'<button type="button" class="dt-small" data-candidate="{number}" '
            f'aria-label="choose {escape(entry["name"])}">choose</button>'
        )
    if is_chosen and chosen[0] != chosen[1]:  # guidance branches differ; a click sets both
        branch = ("cond", "uncond")[chosen.index(number)]
        button = f'<b class="dt-chosen">{branch}</b> {button}'
    branches = " / ".join(
        "-" if row[number] is None else f"{row[number]:.3f}" for row in cell["branches"]
    )
    shown = "cannot run" if error is None else f"{error:.4f}"
    kind = ' class="dt-is-chosen"' if is_chosen else ""
    return (
        f"<tr{kind}><td>{button}</td><td>{shown}</td><td>{entry['density']:.3f}</td>"
        f'<td title="{escape(entry["name"])}">{escape(readable(entry["name"]))}</td>'
        f"<td>{branches}</td></tr>"
    )


def readable(name: str) -> str:
    """Return a candidate's name without quotes, and without what all candidates share."""
    short = re.sub(r"(, )?(block_size=\d+|stride=1)(?=[,)])", "", name).replace('"', "")
    return short.replace("(, ", "(").replace("()", "")


def picture(levels: list[int], text: str) -> str:
    """Return an <img> of a map of levels 0 to 255."""
    return f'<img alt="{escape(text)}" src="{_png(bytes(levels))}">'


@lru_cache(maxsize=8192)
def _png(levels: bytes) -> str:
    from PIL import Image

    side = round(len(levels) ** 0.5)
    level = np.frombuffer(levels, np.uint8).reshape(side, side).astype(np.float32)
    pixels = np.stack([np.minimum(level * 1.6, 255), level * 0.9, 80 + level * 0.5], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
