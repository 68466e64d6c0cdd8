"""Plans: which method runs where, and files that survive damage, typing errors and other models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dittools.errors import PlanError, UnknownMethod
from dittools.methods import build
from dittools.plans import ModelFacts, Plan, Rule, Schedule

WAN = ModelFacts("WanTransformer3DModel", 4, 2, 12, tuple(f"blocks.{i}.attn1" for i in range(4)))
RADIAL = build("radial", {"decay": 0.3})
GNA = build("gna")


def names(plan: Plan, layer: int, step: int, steps: int = 10, heads: int = 4) -> list[str]:
    """The method of every head, in head order."""
    chosen = [""] * heads
    for members, method in plan.rules_for(layer, f"blocks.{layer}.attn1", step, steps, heads):
        for head in members:
            assert not chosen[head], "a head is covered twice"
            chosen[head] = method.name
    return chosen


def test_without_a_rule_attention_is_dense() -> None:
    assert names(Plan(), 0, 0) == ["dense"] * 4


@pytest.mark.parametrize(
    ("share", "steps", "want"),
    [
        (0.25, 4, 1),
        (0.24, 50, 12),
        (0.24, 4, 1),
        (0.01, 4, 1),
        (0.0, 4, 0),
        (0.25, 5, 2),
        (3, 4, 3),
    ],
)
def test_a_share_of_the_steps_is_rounded_up(share: float | int, steps: int, want: int) -> None:
    plan = Plan.of(RADIAL, dense_first_steps=share)
    dense = [names(plan, 0, step, steps)[0] == "dense" for step in range(steps)]
    assert sum(dense) == want
    assert dense == sorted(dense, reverse=True), "dense steps come first"


def test_last_steps_and_first_layers_stay_dense() -> None:
    plan = Plan.of(RADIAL, dense_last_steps=2, dense_layers=1)
    assert [names(plan, 1, step, 5)[0] for step in range(5)] == ["radial"] * 3 + ["dense"] * 2
    assert names(plan, 0, 0) == ["dense"] * 4


def test_a_run_of_unknown_length_keeps_shares_dense_but_counts_whole_steps() -> None:
    assert names(Plan.of(RADIAL, dense_first_steps=0.25), 0, 9, steps=0) == ["dense"] * 4
    counted = Plan.of(RADIAL, dense_first_steps=2)
    assert [names(counted, 0, step, steps=0)[0] for step in (1, 2)] == ["dense", "radial"]


def test_the_later_rule_wins_and_every_head_is_covered() -> None:
    plan = Plan((Rule(RADIAL), Rule(GNA, layers=(1,), heads=(0, 2), steps=(0.5, 1.0))))
    assert names(plan, 1, 4) == ["radial"] * 4
    assert names(plan, 1, 5) == ["gna", "radial", "gna", "radial"]
    assert names(plan, 2, 5) == ["radial"] * 4


def test_equal_methods_of_different_rules_run_together() -> None:
    rules = tuple(Rule(build("radial", {"decay": 0.3}), heads=(head,)) for head in range(4))
    assert Plan(rules).rules_for(0, "", 0, 1, 4) == [((0, 1, 2, 3), RADIAL)]


def test_module_paths_name_a_layer_with_and_without_the_component() -> None:
    rule = Rule(GNA, layers=("transformer_2.blocks.3.attn1", "blocks.0.attn1"))
    assert rule.covers_layer(3, "transformer_2.blocks.3.attn1")
    assert not rule.covers_layer(3, "transformer.blocks.3.attn1")
    assert rule.covers_layer(0, "transformer.blocks.0.attn1")
    assert not Rule(GNA, layers=("transformer_blocks.0.attn",)).covers_layer(
        0, "transformer.single_transformer_blocks.0.attn"
    )


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Schedule(dense_first_steps=1.0),
        lambda: Schedule(dense_first_steps=-1),
        lambda: Schedule(dense_last_steps=True),
        lambda: Schedule(dense_layers=0.5),
        lambda: Rule(GNA, steps=(0.5, 0.5)),
        lambda: Rule(GNA, layers=()),
        lambda: Rule(GNA, heads=(-1,)),
        lambda: Rule(GNA, heads=("0",)),
    ],
)
def test_unusable_choices_are_refused(bad: object) -> None:
    with pytest.raises(PlanError, match="expected"):
        bad()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"class_name": "FluxTransformer2DModel"}, "class FluxTransformer2DModel"),
        ({"layers": 5}, "layers 5"),
        ({"heads": 3}, "heads 3"),
        ({"head_dim": 64}, "head_dim 64"),
    ],
)
def test_a_plan_for_another_model_is_refused(change: dict[str, object], word: str) -> None:
    made_for = ModelFacts(**{**vars(WAN), **change})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=word):
        Plan((Rule(RADIAL),), model=made_for).check(WAN)
    Plan((Rule(RADIAL),), model=WAN).check(WAN)


@pytest.mark.parametrize(
    "rule",
    [Rule(GNA, layers=(4,)), Rule(GNA, layers=("blocks.9.attn1",)), Rule(GNA, heads=(2,))],
)
def test_rules_for_what_the_model_lacks_are_refused(rule: Rule) -> None:
    with pytest.raises(PlanError, match="rule 0 of the plan does not fit"):
        Plan((rule,)).check(WAN)


def full_plan() -> Plan:
    return Plan(
        (
            Rule(RADIAL),
            Rule(GNA, layers=(1, "blocks.2.attn1"), heads=(0,), steps=(0.25, 1.0)),
        ),
        Schedule(0.25, 1, 1),
        ModelFacts("WanTransformer3DModel", 4, 2, 12),
        {"order": torch.arange(6).reshape(2, 3)},
        {"by": "test"},
        {"psnr": 31.5},
    )


def test_a_saved_plan_comes_back_equal_and_saves_to_equal_bytes(tmp_path: Path) -> None:
    plan = full_plan()
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert (loaded.rules, loaded.schedule, loaded.model) == (plan.rules, plan.schedule, plan.model)
    assert (loaded.provenance, loaded.measured) == (plan.provenance, plan.measured)
    assert torch.equal(loaded.tensors["order"], plan.tensors["order"])
    assert type(loaded.schedule.dense_first_steps) is float
    assert type(loaded.schedule.dense_last_steps) is int
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again" / "plan.json")
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "plan.json", "plan.safetensors"]


def test_the_file_is_the_documented_json(tmp_path: Path) -> None:
    content = json.loads(full_plan().save(tmp_path / "plan.json").read_text())
    assert (content["format"], content["version"]) == ("dittools-plan", 1)
    assert content["model"] == {
        "class": "WanTransformer3DModel",
        "layers": 4,
        "heads": 2,
        "head_dim": 12,
    }
    assert content["rules"][1]["layers"] == [1, "blocks.2.attn1"]
    assert content["rules"][0]["params"]["decay"] == 0.3
    assert set(content["tensors"]) == {"file", "sha256"}


def changed(path: Path, **changes: object) -> Path:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"format": "other"}, "not a plan"),
        ({"version": 2}, "version 1"),
        ({"colour": 1}, "unknown keys.*colour"),
        ({"schedule": {"dense_steps": 1}}, "unknown keys.*dense_steps"),
        ({"schedule": {"dense_first_steps": 2.5}}, "dense_first_steps is not usable"),
        ({"schedule": []}, "schedule of .* malformed"),
        ({"model": {"class": "X"}}, "model of .* malformed"),
        ({"rules": {}}, "holds no rules"),
        ({"rules": [{"layers": "all"}]}, "rule 0 .* malformed"),
        ({"rules": [{"method": "radial", "blocks": 1}]}, "unknown keys.*blocks"),
        ({"rules": [{"method": "radial", "heads": []}]}, "rule 0 .*heads"),
        ({"rules": [{"method": "radial", "params": {"decay": {"tensor": "x"}}}]}, "lacks tensor"),
        ({"tensors": {"file": "../up.safetensors", "sha256": ""}}, "same folder"),
        ({"tensors": {"file": "gone.safetensors", "sha256": ""}}, "missing"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    path = changed(Plan.of(RADIAL).save(tmp_path / "plan.json"), **changes)
    with pytest.raises(PlanError, match=word) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_method_in_a_file_lists_the_names(tmp_path: Path) -> None:
    path = changed(Plan.of(RADIAL).save(tmp_path / "p.json"), rules=[{"method": "radiall"}])
    with pytest.raises(UnknownMethod, match="radial"):
        Plan.load(path)


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_truncated_plan_is_refused(tmp_path: Path, length: int) -> None:
    path = full_plan().save(tmp_path / "plan.json")
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[:length])
    with pytest.raises(PlanError, match=r"damaged or cut short.*try"):
        Plan.load(path)


def test_a_changed_tensor_file_is_refused(tmp_path: Path) -> None:
    path = full_plan().save(tmp_path / "plan.json")
    side = tmp_path / "plan.safetensors"
    blob = bytearray(side.read_bytes())
    blob[-1] ^= 1
    side.write_bytes(bytes(blob))
    with pytest.raises(PlanError, match="sha256"):
        Plan.load(path)


def test_a_missing_plan_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan file at .*nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot write"):
        full_plan().save(tmp_path / "no_such_folder" / "plan.json")
    with pytest.raises(PlanError, match="JSON"):
        replace(full_plan(), provenance={"when": object()}).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []
