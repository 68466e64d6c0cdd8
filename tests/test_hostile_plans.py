"""Plans that must not crash, hang, or reach beyond their folder; each was found by fuzzing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import DitToolsError, InputError, PlanError
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.methods import build
from dittools.methods.paro_tables import ParoTables
from dittools.plans import Plan, Rule


def written(folder: Path, method: str, params: Any, **more: Any) -> Path:
    rule = {"layers": "all", "heads": "all", "steps": "all", "method": method, "params": params}
    content = {"format": "dittools-plan", "version": 1, "rules": [rule], **more}
    (folder / "plan.json").write_text(json.dumps(content))
    return folder / "plan.json"


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("vmoba", {"spatial": 3}),
        ("vmoba", {"box": [1, [2], 3]}),
        ("psa", {"similarity": True}),
        ("psa", {"sample": 2**63 - 1}),
        ("clear", {"spatial_weights": 0.5}),
        ("clear", {"spatial_weights": [[[1]]]}),
        ("gna", {"tile": [1, 1, 10**9]}),
        ("gna", {"window": [[1], 1, 1]}),
        ("sta", {"window": {"tensor": []}}),
        ("tome", {"seed": 2**62}),
        ("random", {"seed": 2**62}),
        ("sparge", {"block_size": 10**9}),
        ("freeswim", {"native": [30, "52"]}),
        ("radial", {"decay": {"tensor": ["x"]}}),
        ("radial", {"decay": {"tensor": {}}}),
    ],
)
def test_parameters_of_another_kind_or_size_are_refused(
    tmp_path: Path, method: str, params: Any
) -> None:
    with pytest.raises((InputError, PlanError), match=r"expected|lacks") as caught:
        Plan.load(written(tmp_path, method, params))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "params"),
    [("clear", {"radius": 1e300}), ("tome", {"seed": 2**40, "random": True})],
)
def test_large_values_that_mean_something_run(
    tmp_path: Path, method: str, params: dict[str, Any]
) -> None:
    plan = Plan.load(written(tmp_path, method, params))
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    call = AttentionCall(q, k, v, TokenGrid(1, 4, 4), layer=3, step=1, steps=4)
    assert plan.rules[0].method.attend(call, load("reference")).isfinite().all()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format": NaN}', '{"version": 1' + "0" * 5000 + "}", '{"format": "\\ud800"}'],
)
def test_json_that_could_surprise_is_a_damaged_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="damaged or cut short"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_too_large_or_no_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(17_000_000)
    with pytest.raises(PlanError, match="17000000 bytes, more than 16000000"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "link.json"):
        with pytest.raises(PlanError, match="no ordinary file"):
            Plan.load(path)


def test_an_error_quotes_a_part_of_what_was_given(tmp_path: Path) -> None:
    with pytest.raises(DitToolsError) as caught:
        Plan.load(written(tmp_path, "radial", {"decay": "x\x1b[2J" * 100_000}))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_tensors_beside_a_plan_may_not_be_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    plan = Plan((Rule(build("radial")),), tensors={"a": torch.arange(3)})
    path = plan.save(folder / "plan.json")
    (folder / "plan.safetensors").rename(tmp_path / "plan.safetensors")
    (folder / "plan.safetensors").symlink_to(tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="leads to another folder"):
        Plan.load(path)


def test_a_plan_holds_the_tables_it_was_given_by_name(tmp_path: Path) -> None:
    masks = torch.ones(1, 1, 2, 1, 1, dtype=torch.bool)
    made = ParoTables.pack(TokenGrid(1, 4, 4), 16, torch.tensor([[0, 1]]), masks, [0], [0])
    made.save(tmp_path / "tables.safetensors")
    named = Rule(build("paro", {"tables": str(tmp_path / "tables.safetensors")}))
    (tmp_path / "a").mkdir()
    loaded = Plan.load(Plan((named,)).save(tmp_path / "a" / "plan.json"))
    held = loaded.rules[0].method.tables  # type: ignore[attr-defined]
    assert held.orders.tolist() == [[0, 1]]
    assert str(tmp_path) not in (tmp_path / "a" / "plan.json").read_text()

    beside = Plan.load(written(tmp_path, "paro", {"tables": "tables.safetensors"}))
    assert beside.rules[0].method.tables.orders.tolist() == [[0, 1]]  # type: ignore[attr-defined]
    for name in (
        "../tables.safetensors",
        str(tmp_path / "tables.safetensors"),
        "a\0b",
        "/dev/zero",
    ):
        with pytest.raises(PlanError, match="names a file elsewhere"):
            Plan.load(written(tmp_path, "paro", {"tables": name}))
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(written(tmp_path, "paro", {"tables": "gone.safetensors"}))


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 0},
        {"block_size": 2.5},
        {"bin_of_step": []},
        {"bin_of_step": [-1]},
        {"bin_of_step": [10**9]},
        {"grid": [1, 4]},
        {"grid": [1, 4, 4, 0, -1]},
        {"grid": "1,4,4,0,0"},
        {"orders": torch.zeros(0, 0, dtype=torch.uint8)},
        {"orders": torch.tensor([[0, 9]], dtype=torch.uint8)},
        {"orders": torch.tensor([[0.0, 1.0]])},
        {"masks": torch.ones(1, 1, 2, 1)},
        {"masks": None},
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    masks = torch.ones(1, 1, 2, 1, 1, dtype=torch.bool)
    made = ParoTables.pack(TokenGrid(1, 4, 4), 16, torch.tensor([[0, 1]]), masks, [0], [0])
    ParoTables.of_param(made.to_param())
    with pytest.raises((PlanError, InputError), match=r"paro tables|TokenGrid"):
        ParoTables.of_param({**made.to_param(), **change})
