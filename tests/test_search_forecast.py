"""Forecasts from kernel times, configs and a toy pipeline; the three commands' bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dittools
from dittools.cli import main
from dittools.errors import InputError, PlanError
from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.plans import Plan, Rule
from dittools.searching.cost import CostTable, flops_table, load_costs, save_costs
from dittools.searching.forecast import Load, forecast, predict, without_layers

GRID = TokenGrid(8, 12, 12)
LOAD = Load(GRID, 3, 4, 64, 10, attention_share=0.6, seconds=20.0)
GNA = build("gna", {"window": ("full", 0.5, 0.5), "stride": 1, "block_size": 32})
WAN = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "num_layers": 40,
    "ffn_dim": 13824,
    "text_dim": 4096,
    "patch_size": [1, 2, 2],
}


def _times(slow: float) -> CostTable:
    points = ((0.25, 25.0 * slow), (0.75, 75.0 * slow))
    return CostTable("measured", "cpu", "cpu", GRID.total, 4, 64, 100.0, {32: points})


def test_a_dense_plan_changes_nothing() -> None:
    found = predict(LOAD, Plan(), _times(1.0))
    assert found.speedup == pytest.approx(1)
    assert found.density == pytest.approx(1)
    assert found.bound == pytest.approx(2.5)
    assert found.seconds == pytest.approx(20)


def test_the_speed_up_follows_from_times_and_share() -> None:
    mask = GNA.mask(GRID)  # type: ignore[attr-defined]
    found = predict(LOAD, Plan.of(GNA, dense_first_steps=2), _times(1.0))
    time = 0.2 + 0.8 * mask.computed
    assert found.attention_speedup == pytest.approx(1 / time)
    assert found.speedup == pytest.approx(1 / (0.4 + 0.6 * time))
    assert found.density == pytest.approx(0.2 + 0.8 * mask.density)
    assert found.seconds == pytest.approx(20 / found.speedup)
    assert found.losing == ()


def test_losing_layers_are_named_and_left_dense() -> None:
    slow = _times(4.0)
    plan = Plan((Rule(GNA, layers=(0, 2)), Rule(GNA, layers=(1,), heads=(0,), steps=(0.0, 0.1))))
    found = predict(LOAD, plan, slow)
    assert found.losing == (0, 1, 2)
    assert found.speedup == pytest.approx(1)
    assert not found.plan.rules
    assert all(n.attention_speedup < 1 for n in found.layers)
    declining = predict(LOAD, plan, slow, may_decline=True)  # the backend itself goes dense
    assert declining.speedup == pytest.approx(1)


def test_splitting_heads_costs_time() -> None:
    plain = _times(1.0)
    parted = CostTable(**{**vars(plain), "split_ms": 30.0})
    plan = Plan((Rule(GNA, heads=(0, 1)),))
    assert predict(LOAD, plan, parted).speedup < predict(LOAD, plan, plain).speedup


def test_layers_can_be_taken_out_of_any_rule() -> None:
    plan = Plan((Rule(GNA), Rule(GNA, layers=(1, 2))))
    left = without_layers(plan, (1,), 3)
    assert [rule.layers for rule in left.rules] == [(0, 2), (2,)]
    assert without_layers(plan, (), 3) is plan
    named = Plan((Rule(GNA, layers=("b.1",)), Rule(GNA, layers=("b.0", 2))))
    left = without_layers(named, (1, 2), 3, ("b.0", "b.1", "b.2"))
    assert [rule.layers for rule in left.rules] == [(0,)]


def test_methods_that_choose_in_the_run_are_named() -> None:
    found = predict(LOAD, Plan.of(build("vmoba")), flops_table(GRID, 4, 64))
    assert "vmoba chooses in the run" in found.unknown[0]


def test_what_a_search_measured_is_taken_from_the_plan() -> None:
    plan = replace(Plan.of(build("vmoba")), measured={"densities": {"vmoba()": [0.4, 0.5]}})
    found = predict(LOAD, plan, flops_table(GRID, 4, 64))
    assert found.density == pytest.approx(0.4)
    assert found.attention_speedup == pytest.approx(2.0)


@pytest.mark.parametrize(
    "densities",
    [None, [1], "x", {"vmoba()": "b"}, {"vmoba()": []}, {"vmoba()": [5, -3]}, {"vmoba()": [1]}],
    ids=str,
)
def test_malformed_measurements_in_a_plan_are_one_line(densities: Any) -> None:
    plan = replace(Plan.of(build("vmoba")), measured={"densities": densities})
    with pytest.raises(PlanError, match="what the plan says was measured is malformed; expected"):
        predict(LOAD, plan, flops_table(GRID, 4, 64))


def test_a_config_is_counted_in_multiply_adds() -> None:
    found = forecast(WAN, "radial", height=720, width=1280, frames=81, steps=50)
    assert found.basis == "flops"
    assert found.tokens == 21 * 45 * 80
    width = 40 * 128
    attention, rest = 2 * 75600 * width, 6 * width**2 + 2 * width * 13824
    assert found.attention_share == pytest.approx(attention / (attention + rest))
    assert found.dense_seconds is None
    assert 0.1 < found.density < 0.5
    assert 1 < found.speedup < found.bound


def test_a_pipeline_is_timed_and_the_plan_checked() -> None:
    from dittools.pipelines import load

    pipe = load("tiny/wan")
    sizes: dict[str, Any] = {"steps": 3, "frames": 9, "height": 32, "width": 48}
    found = forecast(pipe, GNA, **sizes)
    assert found.basis == "measured"
    assert found.tokens == 18
    assert 0 < found.attention_share < 1
    assert found.dense_seconds is not None
    assert len(found.layers) == 2
    wrong = Plan((Rule(GNA, layers=(7,)),))
    with pytest.raises(PlanError, match=r"layers 0\.\.1"):
        forecast(pipe, wrong, **sizes)


@pytest.mark.parametrize(
    ("config", "words"), [({}, "no num_attention_heads"), (WAN, "no height, width")]
)
def test_configs_without_sizes_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        forecast(config, "gna")


def test_cost_tables_come_back_from_their_file(tmp_path: Path) -> None:
    save_costs(_times(1.0), tmp_path / "cost.json")
    assert load_costs(tmp_path / "cost.json") == _times(1.0)
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(PlanError, match="malformed"):
        load_costs(tmp_path / "cost.json")


def test_public_names_are_functions() -> None:
    assert callable(dittools.search)
    assert callable(dittools.forecast)
    assert dittools.SearchResult.__name__ == "SearchResult"


def _line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0), capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "--prompts", "P", "--model", "tiny/wan"], "exactly one target"),
        (["search", "--prompts", "missing", "--target-density", "0.4"], "cannot read"),
        (["search", "--prompts", "EMPTY", "--target-density", "0.4"], "holds no prompt"),
        (["search", "--prompts", "P", "--target-density", "0.4", "--dense-heads", "1"], "layer:h"),
        (["search", "--prompts", "P", "--target-density", "4"], "not usable"),
        (["forecast"], "--plan or --method"),
        (["forecast", "--plan", "missing.json"], "no plan file"),
        (["inspect", "--plan", "missing.json"], "no plan file"),
        (["inspect", "--prompts", "EMPTY"], "holds no prompt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "P").write_text("a cat\na dog\n")
    (tmp_path / "EMPTY").write_text("\n")
    placed = [str(tmp_path / a) if a in ("P", "EMPTY") else a for a in arguments]
    code, out = _line(capsys, [*placed, "--json"])
    assert code == 2
    assert words in json.loads(out)["error"]
    assert out.count("\n") == 1


def test_a_config_file_is_forecast_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, plan = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(WAN))
    Plan.of(build("gna")).save(plan)
    sizes = ["--frames", "81", "--height", "480", "--width", "832"]
    code, out = _line(
        capsys, ["forecast", "--model", str(config), "--plan", str(plan), *sizes, "--json"]
    )
    assert code == 0
    assert json.loads(out)["tokens"] == 21 * 30 * 52
