"""One profile per head: how cheaply it can be made sparse, and how much it matters for guidance."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dittools.methods.headhunter import head_name
from dittools.searching.page import document, table

TOLERANCE = 0.1  # relative error at which a candidate counts as good enough for a head


@dataclass(frozen=True)
class HeadProfile:
    """One head.

    Attributes:
        head: "L12H3", counted as guidance counts layers.
        kind: what it looks at, of the step range with most steps.
        density: least density within the tolerance, mean over the steps; low is cheap.
        gain: of the score when this head alone is perturbed, over no guidance.
    """

    head: str
    kind: str
    density: float
    gain: float


def profiles(
    atlas: Mapping[str, Any], gains: Mapping[str, float], sites: Sequence[int]
) -> list[HeadProfile]:
    """Return the profile of every head that is in both.

    Args:
        atlas: of `dittools inspect`.
        gains: score over no guidance by head, as `Found.gains`.
        sites: the atlas's layer of each layer that guidance counts.
    """
    densities = [candidate["density"] for candidate in atlas["candidates"]]
    steps = atlas["range_steps"]
    main = max(range(len(steps)), key=lambda part: steps[part])
    cells = {(c["layer"], c["head"], c["range"]): c for c in atlas["cells"]}
    found = []
    for layer, site in enumerate(sites):
        for head in range(atlas["heads"]):
            name = head_name(layer, head)
            if name not in gains or (site, head, main) not in cells:
                continue
            mine = [cells[site, head, part] for part in range(len(steps))]
            least = [_least(cell["error"], densities) for cell in mine]
            mean = sum(d * n for d, n in zip(least, steps, strict=True)) / max(sum(steps), 1)
            kind = cells[site, head, main]["class"]
            found.append(HeadProfile(name, kind, mean, gains[name]))
    return found


def _least(errors: Sequence[float | None], densities: Sequence[float]) -> float:
    """Return the least density whose error is within the tolerance; dense always is."""
    pairs = zip(errors, densities, strict=True)
    return min([1.0, *(d for e, d in pairs if e is not None and e <= TOLERANCE)])


def rank_correlation(found: Sequence[HeadProfile]) -> float | None:
    """Return Spearman's rank correlation of density and gain; None when either is constant."""
    density, gain = _ranks([p.density for p in found]), _ranks([p.gain for p in found])
    count = len(found)
    mean = (count - 1) / 2
    above = sum((a - mean) * (b - mean) for a, b in zip(density, gain, strict=True))
    spread = sum((a - mean) ** 2 for a in density) * sum((b - mean) ** 2 for b in gain)
    return above / spread**0.5 if spread > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0, equal values sharing their mean rank."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def guidance_page(details: Mapping[str, Any], found: Sequence[HeadProfile], remark: str) -> str:
    """Return the report of a guidance search as one self-contained page.

    Args:
        details: content of guidance.json.
        found: profiles, empty when no atlas was made.
        remark: why there is no atlas, "" when there is one.
    """
    base = details["baseline"]
    intro = (
        f"<p>Score {html.escape(details['scorer'])} without guidance: {base:.4f}. "
        f"{details['generations']} generations: {len(details['pairs'])} prompts, "
        f"{details['pool']} heads, {details['rounds']} rounds of {details['top_k']}; "
        f"scale {details['scale']:g}, u {details['u']:g}, {details['mode']}.</p>"
    )
    rows = [
        [number, head, one["scores"][head], one["scores"][head] - base]
        for number, one in enumerate(details["found"], start=1)
        for head in one["chosen"]
    ]
    body = intro + "<h2>Chosen heads</h2>" + table(["round", "head", "score", "gain"], rows)
    if found:
        body += "<h2>Cheap to sparsify, and worth guiding by?</h2>" + _relation(found)
    elif remark:
        body += f'<p class="soft">No head atlas: {html.escape(remark)}</p>'
    data = {**details, "profile": [asdict(one) for one in found]}
    return document("dittools search: guidance", body, data, "")


def _relation(found: Sequence[HeadProfile]) -> str:
    rank = rank_correlation(found)
    words = "one of the two is the same for every head" if rank is None else f"{rank:+.2f}"
    ordered = sorted(found, key=lambda one: -one.gain)
    rows: list[list[Any]] = [[p.head, p.kind, p.density, p.gain] for p in ordered]
    return (
        f"<p>Rank correlation of the density a head needs (error within {TOLERANCE:g}) and its "
        f"gain as guidance: {words}, over {len(found)} heads.</p>"
        + _scatter(found)
        + table(["head", "looks at", "density needed", "gain"], rows)
    )


def _scatter(found: Sequence[HeadProfile]) -> str:
    """Return an SVG: density needed to the right, gain upwards."""
    gains = [p.gain for p in found]
    low, high = min(*gains, 0.0), max(*gains, 0.0)
    span = (high - low) or 1.0

    def place(p: HeadProfile) -> tuple[float, float]:
        return 50 + 420 * p.density, 230 - 200 * (p.gain - low) / span

    zero = 230 - 200 * (0 - low) / span
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--mark)"><title>{p.head}: density '
        f"{p.density:.3f}, gain {p.gain:+.4f}</title></circle>"
        for p in found
        for x, y in [place(p)]
    )
    return (
        '<svg viewBox="0 0 500 270" style="max-width:40rem" role="img" '
        'aria-label="gain as guidance over density needed">'
        f'<line x1="50" y1="{zero:.1f}" x2="470" y2="{zero:.1f}" stroke="var(--line)"/>'
        f'{dots}<text x="50" y="255">density needed 0</text><text x="440" y="255">1</text>'
        f'<text x="4" y="36">{high:+.3f}</text><text x="4" y="232">{low:+.3f}</text></svg>'
    )
