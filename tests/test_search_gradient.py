"""Sensitivity by a backward pass: what it predicts happens, and perturbed runs agree with it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import dittools
from dittools.errors import InputError
from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan, Rule
from dittools.searching import Budget
from dittools.searching.api import make_request
from dittools.searching.cost import flops_table
from dittools.searching.gradient import carry_back, gradient_weights
from dittools.searching.measure import Bench, sites_for
from dittools.searching.probe import BRANCHES
from dittools.searching.request import Constraints
from dittools.searching.run import calibrated, prepare
from dittools.searching.solver import Solver
from dittools.searching.store import Store
from dittools.searching.table import flat_weights
from dittools.searching.weigh import measure_sensitivity

SIZE: dict[str, Any] = {"steps": 4, "frames": 9, "height": 32, "width": 48, "guidance": 3.0}
PROMPTS = ["a red circle", "a blue square"]
GIVEN: dict[str, Any] = {"methods": ["gna"], "budget": Budget(1, 1, 36, 1, 2, 2, 0, 8), **SIZE}


class Noise:
    """A method that adds given noise to one head's output at one call."""

    name = "noise"

    def __init__(self, layer: int, step: int, branch: str, head: int, size: float) -> None:
        self.place, self.head, self.size = (layer, step, branch), head, size
        self.seed = 0

    def not_supported(self, call: Any) -> list[str]:
        return []

    def attend(self, call: Any, backend: Any) -> torch.Tensor:
        out = backend.dense(call).clone()
        if (call.layer, call.step, call.branch) == self.place:
            generator = torch.Generator().manual_seed(self.seed)
            out[:, :, self.head] += self.size * torch.randn(
                out[:, :, self.head].shape, generator=generator
            )
        return out


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("tiny/wan")


def _final(pipe: Any, use: Settings, plan: Plan) -> torch.Tensor:
    with attach(pipe, plan, backend="reference", check_finite=False):
        found: torch.Tensor = pipe(
            prompt=use.prompt,
            height=use.height,
            width=use.width,
            num_frames=use.frames,
            num_inference_steps=use.steps,
            guidance_scale=use.guidance,
            generator=torch.Generator().manual_seed(use.seed),
            output_type="latent",
        ).frames
    return found


def test_the_gradient_predicts_the_final_error_of_small_errors(pipe: Any) -> None:
    request = make_request(pipe, PROMPTS, target_density=0.5, **GIVEN)
    facts, _ = prepare(pipe, request)
    sites = sites_for(facts, request.ranges, 8, 1, 0)
    use = request.calibration[0]
    found = carry_back(pipe, use, sites, vectors=24, seed=0)
    assert bool((found["calls"][:, :, :2] == 24).all())
    clean = _final(pipe, use, Plan())
    for place in ((0, 0, "cond", 1), (1, 2, "uncond", 0), (1, 3, "cond", 0)):
        noise = Noise(*place, size=1e-2)
        changes = []
        for noise.seed in range(4):
            moved = _final(pipe, use, Plan((Rule(noise),)))
            changes.append(float((moved - clean).double().square().sum()))
        layer, step, branch, head = place
        gradient = float(found["gradient"][layer, step, BRANCHES.index(branch), head]) / 24
        predicted = 1e-4 * gradient * facts.grid.total
        assert sum(changes) / 4 == pytest.approx(predicted, rel=0.5)


def test_it_ranks_layers_and_steps_as_perturbed_generations_do(pipe: Any) -> None:
    request = make_request(pipe, PROMPTS, target_density=0.5, **GIVEN)
    facts, candidates = prepare(pipe, request)
    bench = Bench(pipe, Store(None), "cpu")
    sites = sites_for(facts, request.ranges, 36, 1, 0)
    table = calibrated(bench, request, facts, candidates, sites)
    costs = flops_table(facts.grid, facts.model.heads, facts.model.head_dim)
    solver = Solver(table, flat_weights(table), costs, Constraints(), facts.model)
    choice = solver.solve(0.4).choice
    perturbed = measure_sensitivity(
        bench, table, choice, facts.model, request.calibration, tuple(range(facts.model.layers))
    )
    result = carry_back(pipe, request.calibration[0], sites, 8, 0)
    weight, both = gradient_weights(result, sites, facts)
    assert weight.shape == perturbed.weight.shape
    assert both.shape == (*weight.shape[:2], 2, weight.shape[2])
    assert bool((weight > 0).all())
    ranks = [
        w.mean(dim=2).flatten().argsort().argsort().double() for w in (weight, perturbed.weight)
    ]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.6


def test_a_search_by_gradient_weighs_every_head(pipe: Any) -> None:
    found = dittools.search(pipe, PROMPTS, target_density=0.5, sensitivity="gradient", **GIVEN)
    assert found.frontier["weights"]["kind"] == "gradient"
    assert found.frontier["weights"]["layers_perturbed"] == [0, 1]
    again = dittools.search(pipe, PROMPTS, target_density=0.5, sensitivity="gradient", **GIVEN)
    assert again.frontier == found.frontier


def test_what_cannot_go_backward_says_so(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = type(pipe).__call__.__wrapped__
    monkeypatch.setattr(type(pipe), "__call__", run)  # nothing under it to run with gradients
    request = make_request(pipe, PROMPTS, target_density=0.5, **GIVEN)
    facts, _ = prepare(pipe, request)
    sites = sites_for(facts, request.ranges, 8, 1, 0)
    with pytest.raises(InputError, match="cannot be run backward"):
        carry_back(pipe, request.calibration[0], sites, 1, 0)
    with pytest.raises(InputError, match="unknown kind of sensitivity"):
        replace(request, sensitivity="guess")


def test_the_model_is_left_as_it_was(pipe: Any) -> None:
    request = make_request(pipe, PROMPTS, target_density=0.5, **GIVEN)
    facts, _ = prepare(pipe, request)
    before = generate(pipe, request.calibration[0]).frames
    carry_back(pipe, request.calibration[0], sites_for(facts, request.ranges, 8, 1, 0), 1, 0)
    assert "forward" not in vars(pipe.transformer)
    assert "prepare_latents" not in vars(pipe)
    assert (generate(pipe, request.calibration[0]).frames == before).all()
