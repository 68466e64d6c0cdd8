"""Presets are the authors' numbers, and say so; where nothing is published, that is said."""

from typing import Any, NamedTuple

import pytest

from dittools.methods import METHODS, build, preset, to_params
from dittools.methods.presets import PUBLISHED
from dittools.patches import attach, detach
from dittools.pipelines import tiny


class Row(NamedTuple):
    """One line of a paper or script, typed from there: steps as they are counted there."""

    dense: int
    steps: int
    layers: int
    params: dict[str, Any]


PAPERS = {
    ("radial", "wan"): Row(12, 50, 1, {"decay": 0.2, "sink": True, "block_size": 128}),
    ("radial", "wan22"): Row(11, 40, 1, {"decay": 0.8, "sink": True, "block_size": 64}),
    ("radial", "hunyuan_video"): Row(12, 50, 0, {"decay": 0.95, "sink": False, "block_size": 128}),
    ("gna", "hunyuan_video"): Row(
        0, 50, 0, {"window": ("full", 0.8334, 0.5), "stride": (1, 32, 8)}
    ),
    ("gna", "cosmos"): Row(12, 35, 0, {"window": ("full", 0.7273, 0.6), "stride": (1, 8, 16)}),
    ("gna", "flux"): Row(9, 28, 0, {"window": ("full", 0.3125, 0.3125), "stride": (1, 16, 16)}),
    ("sta", "hunyuan_video"): Row(0, 50, 0, {"window": (5, 5, 5), "tile": (6, 8, 8)}),
    ("sparse_vdit", "cogvideox15"): Row(0, 50, 0, {"density": 0.265}),
    ("sparse_vdit", "hunyuan_video"): Row(10, 50, 0, {"density": 0.15}),
    ("sparse_vdit", "wan"): Row(10, 50, 0, {"density": 0.298}),
    ("paro", "cogvideox"): Row(0, 50, 0, {"density": 0.3}),
    ("paro", "wan"): Row(0, 50, 0, {"density": 0.5}),
    ("paro", "flux"): Row(0, 28, 0, {"density": 0.5}),
    ("rectified", "hunyuan_video"): Row(0, 50, 0, {"density": 0.2}),
    ("rectified", "wan"): Row(5, 50, 2, {"density": 0.25}),
    ("rectified", "wan22"): Row(3, 40, 2, {"density": 0.15}),
    ("rectified", "cogvideox15"): Row(5, 50, 0, {"density": 0.15}),
    ("rectified", "flux"): Row(0, 28, 0, {"density": 0.1}),
    ("psa", "wan"): Row(15, 50, 0, {"rule": "threshold", "ends": (0.4, 0.5, 0.6, 0.8)}),
    ("psa", "wan22"): Row(
        12, 40, 0, {"rule": "threshold", "ends": (0.5, 0.6, 0.6, 0.8), "key_block": 32}
    ),
    ("psa", "cogvideox15"): Row(
        15, 50, 0, {"rule": "topk", "ends": (0.1, 0.15, 0.15, 0.35), "key_block": 32}
    ),
    ("psa", "cogvideox"): Row(15, 50, 0, {"rule": "topk", "ends": (0.1, 0.15, 0.15, 0.35)}),
    ("svg", "wan"): Row(10, 50, 1, {"density": 0.3, "sink": True, "band": "ceil"}),
    ("svg", "hunyuan_video"): Row(5, 50, 1, {"density": 0.25, "sink": False, "band": "floor"}),
    ("svg2", "wan"): Row(10, 50, 1, {"q_clusters": 300, "mass": 0.9}),
    ("svg2", "hunyuan_video"): Row(5, 50, 1, {"q_clusters": 400, "mass": 0.9}),
    ("vmoba", "wan"): Row(13, 50, 0, {"rule": "local_top_k", "top_k": 0.25}),  # a quarter
}


@pytest.mark.parametrize(("method", "family"), PAPERS)
def test_a_preset_is_what_the_paper_says(method: str, family: str) -> None:
    row, found = PAPERS[method, family], preset(method, family)
    params = to_params(found.method)
    for name, value in row.params.items():
        assert params[name] == (list(value) if isinstance(value, tuple) else value), name
    schedule = attach_schedule(found.dense_steps)
    assert schedule.counts(row.steps)[0] == row.dense
    assert found.dense_layers == row.layers
    assert "no published preset" not in found.source


def attach_schedule(share: float) -> Any:
    from dittools.plans.plan import Schedule

    return Schedule(dense_first_steps=share)


@pytest.mark.parametrize(("method", "family"), PUBLISHED)
def test_dense_steps_are_a_share_of_the_run(method: str, family: str) -> None:
    """So that a distilled model of 4 steps keeps one dense, not all of them."""
    found = preset(method, family)
    assert isinstance(found.dense_steps, float) or found.dense_steps == 0
    assert 0 <= found.dense_steps < 0.5
    assert attach_schedule(found.dense_steps).counts(4)[0] in (0, 1, 2)
    assert found.method == build(method, to_params(found.method))


FAMILIES = {
    "wan": "wan",
    "wan22": "wan22",
    "hunyuan_video": "hunyuan_video",
    "cogvideox": "cogvideox",
    "cosmos": "cosmos",
    "flux": "flux",
    "ltx": "ltx",  # nothing published
}


@pytest.mark.parametrize("name", FAMILIES)
def test_attaching_by_name_takes_the_familys_numbers_and_names_the_source(name: str) -> None:
    pipe = tiny.build(name)
    for method in METHODS:
        handle = attach(pipe, method)
        report, published = handle.report(), PUBLISHED.get((method, FAMILIES[name]))
        if published is not None:
            assert report.preset == published.source
            assert report.schedule["dense_first_steps"] == published.dense_steps
            assert report.schedule["dense_layers"] == published.dense_layers
        elif method == "dense":
            assert report.preset == "dense has no settings"
        else:
            assert report.preset.startswith("no published preset for ")
            assert f"using {method}'s defaults" in report.preset
            usual = preset(method, "never heard of").dense_steps
            assert report.schedule["dense_first_steps"] == usual
    detach(pipe)
