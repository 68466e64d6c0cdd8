"""The plots of the studio, readable on a light and on a dark page."""

from typing import Any

GREY = "#808895"  # readable on white and on black
COLOURS = ("#0d9488", "#d97706", "#6366f1", "#db2777", "#84803a", "#64748b")
HIGHEST_DB = 80.0  # better than this looks the same


def frontier_figure(points: dict[str, Any], target: tuple[str, float] | None = None) -> Any:
    """Return PSNR over density: predicted curve, single methods, plans generated so far.

    Args:
        points: "curve", "singles", "trials" and "chosen", as far as known; see `search`'s `watch`.
        target: ("density" or "PSNR", value) is drawn as a line; others are not.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for method, group in _by_method(points.get("singles", [])).items():
        figure.add_scatter(
            x=[p["density"] for p in group],
            y=[
                _shown(p["held_out"]["psnr_db"] if p["held_out"] else p["predicted_db"])
                for p in group
            ],
            text=[f"{p['name']}<br>{'generated' if p['held_out'] else 'predicted'}" for p in group],
            mode="markers",
            name=f"{method} alone",
            marker={
                "size": 7,
                "symbol": ["circle" if p["held_out"] else "circle-open" for p in group],
            },
        )
    curve = points.get("curve", [])
    if curve:
        figure.add_scatter(
            x=[p["density"] for p in curve],
            y=[_shown(p["psnr_db"]) for p in curve],
            mode="lines",
            name="searched, predicted",
            line={"color": COLOURS[0], "width": 2, "dash": "dot"},
        )
    trials = points.get("trials", [])
    if trials:
        figure.add_scatter(
            x=[p["density"] for p in trials],
            y=[_shown(p["psnr_db"]) for p in trials],
            text=[f"plan {n + 1}" for n in range(len(trials))],
            mode="markers",
            name="searched, generated",
            marker={"size": 11, "color": COLOURS[0], "symbol": "diamond"},
        )
    chosen = points.get("chosen")
    if chosen:
        figure.add_scatter(
            x=[chosen["density"]],
            y=[_shown(chosen["psnr_db"])],
            mode="markers",
            name="the plan",
            marker={
                "size": 20,
                "symbol": "diamond-open",
                "color": COLOURS[1],
                "line": {"width": 3},
            },
        )
    _mark(figure, target)
    return styled(figure, "density (share of query-key pairs)", "PSNR against dense, dB")


def parts_figure(cases: list[dict[str, Any]]) -> Any:
    """Return one stacked bar per case: where its time goes, in milliseconds."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = [case["name"] for case in cases][::-1]
    for number, part in enumerate(cases[0]["parts_ms"]):
        figure.add_bar(
            y=names,
            x=[case["parts_ms"][part]["median"] for case in cases][::-1],
            name=part,
            orientation="h",
            marker={"color": COLOURS[number % len(COLOURS)]},
        )
    figure.update_layout(barmode="stack")
    return styled(figure, "milliseconds, median", "")


def speed_figure(cases: list[dict[str, Any]]) -> Any:
    """Return speed-up against closeness to dense, a dot per case with its p20 to p80."""
    import plotly.graph_objects as go

    shown = [case for case in cases if case["fidelity"]]
    ratios = [case["speedup"] for case in shown]
    figure = go.Figure()
    figure.add_scatter(
        x=[ratio["median"] for ratio in ratios],
        y=[_shown(case["fidelity"]["psnr_db"]) for case in shown],
        text=[case["name"] for case in shown],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [ratio["p80"] - ratio["median"] for ratio in ratios],
            "arrayminus": [ratio["median"] - ratio["p20"] for ratio in ratios],
            "color": GREY,
        },
        mode="markers+text",
        textposition="top center",
        marker={"size": 12, "color": COLOURS[0]},
        showlegend=False,
    )
    figure.add_vline(1, line={"color": GREY, "dash": "dash"}, annotation_text="dense")
    styled(figure, "speed-up, times", "PSNR against dense, dB")
    figure.update_yaxes(rangemode="tozero")  # one case alone would fill the axis with decimals
    return figure


def styled(figure: Any, across: str, up: str) -> Any:
    """Return the figure with the studio's look: no background of its own, legend below."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "ui-sans-serif, system-ui, sans-serif", "color": GREY, "size": 13},
        margin={"l": 56, "r": 16, "t": 44, "b": 40},
        legend={"orientation": "h", "y": -0.18, "x": 0, "font": {"size": 12}},
        hoverlabel={"font": {"color": "#fff"}, "bgcolor": "#334155"},
        xaxis={
            "title": {"text": across, "font": {"size": 13}, "standoff": 8},
            "gridcolor": GREY + "44",
            "zerolinecolor": GREY + "66",
        },
        yaxis={
            "title": {"text": up, "font": {"size": 13}},
            "gridcolor": GREY + "44",
            "zeroline": False,
            "automargin": True,
        },
        height=420,
    )
    return figure


def _by_method(singles: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for single in singles:
        groups.setdefault(single["method"], []).append(single)
    return groups


def _shown(psnr_db: float) -> float:
    return min(psnr_db, HIGHEST_DB)


def _mark(figure: Any, target: tuple[str, float] | None) -> None:
    name, value = target or ("", 0.0)
    line = {"color": COLOURS[1], "dash": "dash", "width": 1}
    if name == "density":
        figure.add_vline(value, line=line, annotation_text="target")
    elif name == "PSNR":
        figure.add_hline(value, line=line, annotation_text="target")
