"""Rules for one guidance branch: files, who follows them, and what is said when none can."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import dittools
from dittools.errors import PlanError
from dittools.methods import build
from dittools.patches.refusals import UNKNOWN_BRANCH
from dittools.pipelines import load
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan, Rule

GNA = build("gna", {"window": (1, "full", "full"), "block_size": 16})
SKIP = build("sparse_vdit", {"mode": "skip"})


class Seen:
    """A method that runs dense and notes the branch of every call."""

    name = "seen"

    def __init__(self) -> None:
        self.branches: Counter[str] = Counter()

    def not_supported(self, call: Any) -> list[str]:
        return []

    def attend(self, call: Any, backend: Any) -> torch.Tensor:
        self.branches[call.branch] += 1
        return backend.dense(call)


def test_the_later_rule_wins_on_its_branch_alone() -> None:
    plan = Plan((Rule(GNA), Rule(SKIP, heads=(1,), branch="uncond")))
    assert plan.needs_branch
    assert plan.rules_for(0, "", 0, 4, 2, "cond") == [((0, 1), GNA)]
    assert plan.rules_for(0, "", 0, 4, 2, "uncond") == [((0,), GNA), ((1,), SKIP)]
    for other in ("", "call 1"):
        assert plan.rules_for(0, "", 0, 4, 2, other) == [((0, 1), GNA)]


@pytest.mark.parametrize("bad", ["both", "", None, 1, ["cond"]])
def test_other_branches_are_refused(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="branch is not usable"):
        Rule(GNA, branch=bad)
    path = Plan((Rule(GNA, branch="cond"),)).save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["rules"][0]["branch"] = bad
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"rule 0 of .*branch is not usable"):
        Plan.load(path)


def test_a_branch_survives_the_file_and_is_left_out_where_it_is_all(tmp_path: Path) -> None:
    plan = Plan((Rule(GNA), Rule(SKIP, branch="uncond")))
    path = plan.save(tmp_path / "plan.json")
    rules = json.loads(path.read_text())["rules"]
    assert "branch" not in rules[0]
    assert rules[1]["branch"] == "uncond"
    assert Plan.load(path) == plan


def test_each_branch_of_a_run_follows_its_own_rules() -> None:
    pipe = load("tiny/wan")
    settings = Settings("a red circle", steps=3, frames=9, height=32, width=48, guidance=4.0)
    seen = Seen()
    with dittools.attach(pipe, Plan((Rule(seen, branch="uncond"),)), backend="cpu") as handle:
        generate(pipe, settings)
        assert handle.report().fallbacks.get(UNKNOWN_BRANCH) is None
    sites = len(handle.report().layers)
    assert seen.branches == {"uncond": 3 * sites}


def test_calls_of_no_known_branch_keep_the_rules_for_all_and_are_named() -> None:
    pipe = load("tiny/cogvideox")  # runs both branches as one batch
    settings = Settings("a red circle", steps=2, frames=9, height=32, width=48, guidance=4.0)
    everywhere, one = Seen(), Seen()
    plan = Plan((Rule(everywhere), Rule(one, branch="cond")))
    with dittools.attach(pipe, plan, backend="cpu") as handle:
        generate(pipe, settings)
        report = handle.report()
    assert not one.branches
    assert sum(everywhere.branches.values()) == report.fallbacks[UNKNOWN_BRANCH] > 0
