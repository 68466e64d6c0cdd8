"""The scoreboard as a Markdown page and a plot."""

from pathlib import Path
from typing import Any

from board_rows import NEAR

COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (120, 94, 240),
    (153, 79, 0),
    (90, 90, 90),
    (0, 0, 0),
)
INTRO = """# Scoreboard

Every method on the embedded model ({grid} tokens, {steps} steps, both guidance branches sparse) at
matched densities. A row's clip is compared with the dense clip of the same prompt and seed, over
held-out prompts whose looks the model was never trained on. `make scoreboard` makes this page;
[scoreboard.json](results/scoreboard.json) has the numbers per prompt, parameters and revisions.

![PSNR over density](scoreboard.png)

**How rows are made comparable.** Density is the share of query-key pairs that attention keeps over
the whole run. No row has dense steps: they decide most of the PSNR and would hide the method. Each
method is set to the density on a prompt that is not on the board; of its variants (window shapes,
modes, with or without a sink) the one with the best PSNR on two such prompts runs. A row further
than {near} from the density is marked. All blocks hold 32 tokens.

| column | meaning |
| --- | --- |
| PSNR, SSIM | against the dense clip, mean over prompts |
| gap closed | (PSNR - random) / (oracle - random) |
| prompt score | share of clips that show everything the prompt asks for |
| density | share of pairs kept, mean over prompts |
| computed | share of the pairs in blocks the kernel visits, which is what it works through |
| attention CPU | CPU seconds of one thread in attention and choosing, per clip; no wall time |

`dense, another seed` is what PSNR says of another clip of the same prompt: rows near it have lost
the clip, though theirs may still be a good one. `random` keeps random blocks: a method must beat
it. `oracle` keeps each row's heaviest blocks, known by computing all of attention: the ceiling of
choosing the same number of whole 32-token blocks for every row and head. It is no bound for methods
that reorder tokens per head or let concentrated heads keep less (paro), put dropped blocks back as
means (psa, rectified, metered), or spend unequally over heads and steps (plans).
A searched plan is what `dittools search` found on two calibration prompts that are not on the
board either ([plans](plans)); it mixes methods and spends its density where errors hurt most. The
first of them was asked for a share of `computed`, "published" for one of `density`, when
`metered` and `clustered` were no candidates yet; "fast methods" chooses among those that choose
quickly.
`metered` at densities .2 and .3 is in [metered.md](metered.md), where rows are matched by what
they execute; at .5 it was measured with `first_look=1`, as it was then. The seconds of `metered` at
.4 and of "searched plan" were taken while the machine had other work, and are too high.
"""
MEANING = """## What the ranking means, and what it does not

- It ranks how well a method keeps **this** small model's clips at equal density. The model has 6
  layers of 3 heads and 1,728 tokens; released models have up to 70 times the tokens, where fixed
  windows reach further and choosing costs less. The order may differ there.
- PSNR measures distance to the dense clip, not quality. Two rows 1 dB apart can look alike, and a
  row of 20 dB can be a faultless clip of another course. The prompt score tells whether the clip
  still shows what was asked; with so few prompts one clip is a step of several per cent.
- Equal density is not equal time. Rows whose `computed` exceeds their density pay for cut blocks,
  and rows that choose online pay for choosing: compare attention CPU. On a GPU the costs differ.
- Methods run with the settings that meet the density, not with those their authors tuned for a
  density of their choice, and without the dense steps most of them are published with.
- CPU seconds were taken on a machine that did other work too; they count one thread's own time, but
  caches are shared. Read differences below a tenth as noise.
"""


def page(content: dict[str, Any], short: bool = False) -> str:
    """Return the page; `short` leaves out what is not a table."""
    names = content.get("methods", [])
    tables = [_table(float(d), lines, names) for d, lines in sorted(content["densities"].items())]
    if short:
        return "\n".join(tables)
    grid = " x ".join(map(str, content["grid"]))
    intro = INTRO.format(grid=grid, steps=content["steps"], near=NEAR)
    return "\n".join([intro, *tables, MEANING])


def is_matched(line: dict[str, Any], density: float) -> bool:
    """Whether a row ran near enough to the density of the board to be compared."""
    return line["kind"] == "reference" or bool(abs(line["density"] - density) <= NEAR)


def _order(line: dict[str, Any], density: float) -> tuple[bool, bool, float]:
    is_floor = line["name"] == "dense, another seed"
    return (not is_matched(line, density) and not is_floor, is_floor, -line["psnr_db"])


def _table(density: float, lines: list[dict[str, Any]], methods: list[str]) -> str:
    """Return one density as a Markdown table, best first, rows of another density last.

    Methods without a row are named below it.
    """
    counts = sorted({line["prompts"] for line in lines})
    prompts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    text = [
        f"## Density {density:g}, {prompts} held-out prompts",
        "",
        "| | PSNR dB | SSIM | gap closed | prompt score | density | computed | attention CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in sorted(lines, key=lambda row: _order(row, density)):
        text.append(_row(line, density, counts[-1]))
    missing = [name for name in methods if name not in {line["name"] for line in lines}]
    if missing:
        text += ["", f"Not measured at this density: {', '.join(missing)}."]
    return "\n".join([*text, ""])


def _row(line: dict[str, Any], density: float, most: int) -> str:
    notes = []
    if line["detail"] and line["kind"] != "searched":
        notes.append(line["detail"])
    if not is_matched(line, density) and line["kind"] != "floor":
        notes.append("not matched")
    if line["prompts"] < most:
        notes.append(f"{line['prompts']} prompts")
    name = f"**{line['name']}**" if line["kind"] == "searched" else line["name"]
    name += f" ({', '.join(notes)})" if notes else ""
    same = line["kind"] == "reference"
    gap = f"{line['gap_closed']:.0%}" if "gap_closed" in line else ""
    psnr = "same" if same else f"{line['psnr_db']:.2f}"
    return (
        f"| {name} | {psnr} | {line['ssim']:.3f} | {gap} | {line['prompt']:.0%} | "
        f"{line['density']:.3f} | {line['computed']:.3f} | {line['attention_s']:.2f} |"
    )


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw PSNR over density, one line per method, with its name at the right end."""
    from PIL import Image, ImageDraw, ImageFont

    series: dict[str, list[tuple[float, float]]] = {}
    for density, lines in sorted(content["densities"].items()):
        for line in lines:
            if line["kind"] != "reference" and is_matched(line, float(density)):
                series.setdefault(line["name"], []).append((line["density"], line["psnr_db"]))
    if not series:
        return
    scale, width, height = 2, 860, 520
    image = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13 * scale)
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(xs) - 0.02, max(xs) + 0.02
    bottom, top = int(min(ys)) - 1, int(max(ys)) + 2
    left, right, above, below = 60, 660, 20, 470

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - low) / (high - low) * (right - left)
        return across * scale, (below - (y - bottom) / (top - bottom) * (below - above)) * scale

    for y in range(bottom, top + 1, 2 if top - bottom < 24 else 5):
        draw.line([at(low, y), at(high, y)], fill=(225, 225, 230), width=scale)
        draw.text((16 * scale, at(low, y)[1] - 8 * scale), f"{y} dB", fill="black", font=font)
    for density in content["densities"]:
        x = at(float(density), bottom)[0]
        draw.text((x - 8 * scale, (below + 8) * scale), density, fill="black", font=font)
    draw.text((300 * scale, (below + 28) * scale), "density", fill="black", font=font)
    names = sorted(series, key=lambda name: -max(series[name])[1])
    labels = _spread([at(*max(series[name]))[1] / scale for name in names], 16)
    for number, (name, place) in enumerate(zip(names, labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        points = [at(x, y) for x, y in sorted(series[name])]
        thick = (3 if name.startswith("searched plan") else 1.5) * scale
        draw.line(points, fill=colour, width=int(thick), joint="curve")
        for x, y in points:
            draw.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill=colour)
        end = ((right + 24) * scale, place * scale)
        draw.line([points[-1], end], fill=colour, width=1)
        draw.text((end[0] + 4 * scale, end[1] - 8 * scale), name, fill=colour, font=font)
    image.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def _spread(places: list[float], least: float) -> list[float]:
    """Return rising places at least so far apart, near the wanted ones."""
    out: list[float] = []
    for place in places:
        out.append(max(place, out[-1] + least) if out else place)
    return out
