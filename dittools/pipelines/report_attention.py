"""What the attachment reports, as a part of the page: facts, calls by site, error by step."""

from html import escape
from typing import Any

_APART = ("layers", "errors", "fallbacks", "fallback_sites", "incidents", "incidents_left_out")
_SITES = 3  # named of those that ran dense for one reason
_INCIDENTS = 8  # told on the page; report.json has more


def attention(found: dict[str, Any]) -> str:
    """Return the HTML of an attachment's report, every text escaped.

    Args:
        found: what `Report.to_dict` returns.
    """
    told = [
        (name.replace("_", " "), _words(value))
        for name, value in found.items()
        if name not in _APART and value not in (None, "", [], {})
    ]
    items = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in told + trouble(found))
    return f"<dl>{items}</dl>{_layers(found['layers'])}{_steps(found.get('errors') or {})}"


def trouble(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what ran dense and why, and where the flight recorder stepped in: name and text."""
    lines = []
    for reason, count in found["fallbacks"].items():
        sites = found["fallback_sites"][reason]
        more = " ..." if len(sites) > _SITES else ""
        named = ", ".join(sites[:_SITES])
        lines.append(("Ran dense", f"{count} calls: {reason} ({named}{more})"))
    incidents = found.get("incidents") or []
    lines += [("Incident", _incident(incident)) for incident in incidents[:_INCIDENTS]]
    more_incidents = len(incidents) - _INCIDENTS + (found.get("incidents_left_out") or 0)
    if more_incidents > 0:
        lines.append(("Incident", f"{more_incidents} more"))
    return lines


def _incident(incident: dict[str, Any]) -> str:
    """Return one incident in words; what is None is left out."""
    known = {name: value for name, value in incident.items() if value not in (None, "", [])}
    return ", ".join(f"{name.replace('_', ' ')} {_words(value)}" for name, value in known.items())


def _layers(layers: list[dict[str, Any]]) -> str:
    """Return one row per site."""
    names = ("site", "sparse", "dense", "density", "error")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = ""
    for layer in layers:
        cells = ("" if layer.get(name) is None else _words(layer[name]) for name in names)
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return (
        "<table><caption>Calls by site; error is how far the output was from dense attention, "
        f"relative, by sampled rows</caption><tr>{head}</tr>{rows}</table>"
    )


def _steps(errors: dict[str, dict[str, float]]) -> str:
    """Return a map of the errors: a row for each site, a column for each sampled step."""
    steps = sorted({int(step) for by_step in errors.values() for step in by_step})
    if not steps:
        return ""
    values = [v for by_step in errors.values() for v in by_step.values() if v is not None]
    top = max([*values, 1e-12])
    head = "<th>site</th>" + "".join(f"<th>{step}</th>" for step in steps)
    rows = ""
    for site, by_step in errors.items():
        cells = "".join(_shaded(by_step.get(str(step)), top) for step in steps)
        rows += f"<tr><td>{escape(site)}</td>{cells}</tr>"
    return f"<table><caption>Error by step</caption><tr>{head}</tr>{rows}</table>"


def _shaded(value: float | None, top: float) -> str:
    if value is None:
        return "<td></td>"
    share = round(60 * value / top)
    return (
        f'<td style="background: color-mix(in srgb, #c73 {share}%, transparent)">{value:.3f}</td>'
    )


def _words(value: Any) -> str:
    """Return a value in words: three digits, lists and dicts without brackets."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(key)}: {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    return str(value)
