"""Agent attention and token merging: the spec's numbers, its gates, its limits, and pipelines."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

import dittools
from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.agent import Agent, cell_mean
from dittools.methods.merging import match, merge, unmerge
from dittools.methods.rotation import centre_phases, turn
from dittools.methods.tome import ToMe
from dittools.pipelines import load
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.tiny import settings_for
from dittools.plans import Rule

BACKEND = ReferenceBackend()
PLAIN = {"shortcut": 0.0}


def call_of(grid: TokenGrid, batch: int = 1, heads: int = 2, width: int = 8) -> AttentionCall:
    torch.manual_seed(grid.total)
    q, k, v = (torch.randn(batch, grid.total, heads, width, dtype=torch.float64) for _ in range(3))
    return AttentionCall(q, k, v, grid, step=0, steps=10)


# -- the arithmetic


def spec_call() -> AttentionCall:
    i, j = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)
    q, k, v = (i + 2 * j).sin(), (i - j).cos(), (2 * i + j).sin()
    return AttentionCall(*(t[None, :, None] for t in (q, k, v)), TokenGrid(1, 1, 6), steps=1)


@pytest.mark.parametrize(
    ("params", "row", "expected"),
    [
        ({}, 0, (0.048654, 0.074491, 0.031842, -0.040083)),
        ({}, 5, (-0.013982, -0.067800, -0.059283, 0.003739)),
        ({"exponent": 1.0, "shortcut": 0.0}, 0, (0.045826, 0.010839, -0.034113, -0.047702)),
    ],
)
def test_the_published_arithmetic(
    params: dict[str, Any], row: int, expected: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agents of the spec are plain means of three queries each."""
    call = spec_call()
    means = torch.stack([call.query[:, :3].mean(1), call.query[:, 3:].mean(1)], 1)
    monkeypatch.setattr(Agent, "_pool", lambda *_: means)
    out = Agent(cell=(1, 1, 3), early=1.0, **params).attend(call, BACKEND)[0, :, 0]
    torch.testing.assert_close(out[row], torch.tensor(expected).double(), atol=2e-6, rtol=0)
    if not params:
        assert float(out.sum()) == pytest.approx(-0.142845, abs=2e-6)


def test_constant_values_come_back_with_the_shortcut_on_top() -> None:
    call = call_of(TokenGrid(2, 8, 8, 3, 2))
    call = replace(call, value=torch.ones_like(call.value) * 2.5)
    out = Agent(early=1.0).attend(call, BACKEND)
    torch.testing.assert_close(out[:, 3:-2], torch.full_like(out[:, 3:-2], 2.5 * 1.075))
    torch.testing.assert_close(out[:, :3], torch.full_like(out[:, :3], 2.5))


def test_one_agent_gives_every_row_the_same() -> None:
    call = call_of(TokenGrid(1, 4, 4))
    out = Agent(early=1.0, **PLAIN).attend(call, BACKEND)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_outputs_stay_within_the_values_without_the_shortcut() -> None:
    call = call_of(TokenGrid(1, 16, 12))
    out = Agent(early=1.0, **PLAIN).attend(call, BACKEND)
    assert bool((out <= call.value.amax(1, keepdim=True)).all())
    assert bool((out >= call.value.amin(1, keepdim=True)).all())


def test_keys_and_values_may_change_places_together() -> None:
    call = call_of(TokenGrid(1, 16, 12))
    order = torch.randperm(192)
    mixed = replace(call, key=call.key[:, order], value=call.value[:, order])
    one, other = (Agent(early=1.0, **PLAIN).attend(c, BACKEND) for c in (call, mixed))
    torch.testing.assert_close(one, other)


def test_a_sharp_second_softmax_copies_the_best_agent() -> None:
    call = call_of(TokenGrid(1, 8, 8))
    sharp = Agent(early=1.0, exponent=0.0, **PLAIN)
    call = replace(call, query=call.query * 400, key=call.key / 400)
    out = sharp.attend(call, BACKEND)
    assert len(torch.unique(out[0, :, 0].round(decimals=9), dim=0)) <= 4


def test_identical_agents_act_as_one() -> None:
    grid = TokenGrid(1, 8, 8)
    call = call_of(grid)
    alike = replace(call, query=call.query[:, :1].expand_as(call.query).contiguous())
    several, one = (Agent(cell=(1, side, side), early=1.0, **PLAIN) for side in (4, 8))
    gathered = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (alike.query[:, :1], alike.key, alike.value))
    )
    for method in (several, one):
        out = method.attend(alike, BACKEND)
        torch.testing.assert_close(out, gathered.transpose(1, 2).expand_as(out))
    apart = several.attend(call, BACKEND)  # agents that differ are read in differing shares
    assert not torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-3)


def test_queries_as_their_own_agents_are_not_dense_attention() -> None:
    call = call_of(TokenGrid(1, 4, 6))
    q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
    dense = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5, dim=-1)
    read = torch.softmax(q @ q.transpose(2, 3) * 8 ** (-0.5 * 0.3), dim=-1)
    out = Agent(**PLAIN)._through(call, call.query, BACKEND).transpose(1, 2)
    torch.testing.assert_close(out, read @ dense @ v)
    assert float((out - dense @ v).norm() / (dense @ v).norm()) > 0.2


def test_queries_may_change_places_where_the_agents_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(TokenGrid(1, 8, 12))
    agents = cell_mean(call.query, call.grid, (1, 4, 4))
    monkeypatch.setattr(Agent, "_pool", lambda *_: agents)
    order = torch.randperm(96)
    mixed = replace(call, query=call.query[:, order])
    one, other = (Agent(early=1.0, **PLAIN).attend(c, BACKEND) for c in (call, mixed))
    torch.testing.assert_close(one[:, order], other)


@pytest.mark.parametrize("text", [(0, 7), (5, 0), (3, 4)])
def test_text_rows_are_exact_and_padding_changes_nothing(text: tuple[int, int]) -> None:
    grid = TokenGrid(2, 8, 9, *text)
    call = call_of(grid, batch=2)
    keep = torch.ones(2, grid.total, dtype=torch.bool)
    keep[1, -1 if text[1] else 0] = False
    call = replace(call, key_mask=keep)
    method = Agent(early=1.0, cell=(2, 4, 4))
    out, dense = method.attend(call, BACKEND), BACKEND.dense(call)
    rows = torch.ones(grid.total, dtype=torch.bool)
    rows[grid.text_before : grid.text_before + grid.tokens] = False
    torch.testing.assert_close(out[:, rows], dense[:, rows])
    wild = call.query.clone()
    wild[1, ~keep[1]] = 50.0
    again = method.attend(replace(call, query=wild), BACKEND)
    torch.testing.assert_close(again[:, ~rows], out[:, ~rows])


def test_cells_at_a_border_are_means_of_what_is_there() -> None:
    grid = TokenGrid(3, 5, 6)
    tokens = torch.randn(2, grid.tokens, 4, dtype=torch.float64)
    out = cell_mean(tokens, grid, (2, 4, 4))
    box = tokens.view(2, 3, 5, 6, 4)
    expected = [
        box[:, f : f + 2, y : y + 4, x : x + 4].mean((1, 2, 3))
        for f in (0, 2)
        for y in (0, 4)
        for x in (0, 4)
    ]
    torch.testing.assert_close(out, torch.stack(expected, 1))


# -- rotation


def rope(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    parts = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def angles_of(grid: TokenGrid, at: torch.Tensor) -> torch.Tensor:
    """Three axes share the 8 pairs: 2, 3 and 3."""
    speed = [torch.tensor([1.0, 0.1]), *(torch.tensor([1.0, 0.2, 0.01]),) * 2]
    return torch.cat([at[:, n : n + 1] * s for n, s in enumerate(speed)], 1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_agents_are_turned_to_the_centre_of_their_cells(interleaved: bool) -> None:
    grid = TokenGrid(2, 8, 10)
    axes = [torch.arange(float(n)) for n in grid.shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    plain = torch.randn(2, grid.tokens, 3, 16)
    turned = rope(plain, angles_of(grid, places), interleaved)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return cell_mean(x, grid, (2, 4, 4))

    phases = centre_phases(plain, turned, mean)
    centres = mean(places[None])[0]
    vectors = torch.randn(2, len(centres), 3, 16)
    expected = rope(vectors, angles_of(grid, centres), interleaved)
    torch.testing.assert_close(turn(vectors, phases), expected, atol=2e-5, rtol=1e-4)


def test_a_query_that_is_not_rotated_is_left_alone_and_others_are_refused() -> None:
    grid = TokenGrid(1, 4, 4)
    plain = torch.randn(1, 16, 2, 8)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return cell_mean(x, grid, (1, 2, 2))

    vectors = torch.randn(1, 4, 2, 8)
    assert torch.equal(turn(vectors, centre_phases(plain, plain, mean)), vectors)
    with pytest.raises(dittools.errors.UnsupportedCall, match="agent cannot follow"):
        centre_phases(plain, torch.randn_like(plain), mean)


# -- the matching


def slow_matching(
    x: torch.Tensor, sources: list[int], destinations: list[int]
) -> tuple[list[int], dict[int, int]]:
    """Rank sources by their best cosine, in plain Python."""
    best = {}
    for s in sources:
        cosines = [float(x[s] @ x[d] / x[s].norm() / x[d].norm()) for d in destinations]
        top = max(range(len(destinations)), key=lambda n: cosines[n])
        best[s] = (cosines[top], destinations[top])
    ranked = sorted(sources, key=lambda s: -best[s][0])
    return ranked, {s: best[s][1] for s in sources}


@pytest.mark.parametrize("cell", [(2, 2), (4, 4), (3, 2)])
def test_merging_averages_clusters_and_unmerging_copies(cell: tuple[int, int]) -> None:
    grid = TokenGrid(1, 9, 11)
    x = torch.randn(2, grid.tokens, 6, dtype=torch.float64)
    found = match(x, grid, cell, seed=3)
    assert found is not None
    sources, destinations = found.sources.tolist(), found.destinations.tolist()
    assert sorted(sources + destinations) == list(range(grid.tokens))
    assert len(destinations) == (9 // cell[0]) * (11 // cell[1])
    count = 40
    merged = merge(x, found, count)
    copied = unmerge(merged, found, count)
    assert merged.shape == (2, grid.tokens - count, 6)
    for row in range(2):
        ranked, nearest = slow_matching(x[row], sources, destinations)
        expected = x[row].clone()
        for d in destinations:
            members = [d] + [s for s in ranked[:count] if nearest[s] == d]
            expected[members] = x[row, members].mean(0)
        torch.testing.assert_close(copied[row], expected)
    assert torch.equal(unmerge(merge(x, found, 0), found, 0), x)


def test_each_cell_keeps_one_token_and_the_draw_follows_the_seed() -> None:
    grid = TokenGrid(2, 8, 12)
    x = torch.randn(1, grid.tokens, 4)
    drawn = [match(x, grid, (4, 4), seed) for seed in (1, 1, 2, None)]
    kept = [found.destinations for found in drawn if found is not None]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    for places in kept:
        frame, y, x_ = places // 96, places % 96 // 12, places % 12
        cells = set(zip(frame.tolist(), (y // 4).tolist(), (x_ // 4).tolist(), strict=True))
        assert len(cells) == len(places) == 12
    assert kept[3].tolist()[:3] == [0, 4, 8]
    assert match(x, grid, (9, 4), None) is None


def test_likeness_is_worked_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from dittools.methods import merging

    grid = TokenGrid(1, 16, 16)
    x = torch.randn(2, grid.tokens, 5)
    whole = match(x, grid, (2, 2), 0)
    monkeypatch.setattr(merging, "_PIECE", 700)
    pieces = match(x, grid, (2, 2), 0)
    assert whole is not None
    assert pieces is not None
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)


# -- gates


@pytest.mark.parametrize(
    ("side", "cell", "ratio", "agent_ratio", "tokens", "agents"),
    [
        (64, 4, 0.4, 0.95, 2458, 256),
        (64, 4, 0.1, 0.95, 3687, 256),
        (64, 4, 0.5, 0.95, 2048, 256),
        (64, 4, 0.4, 0.90, 2458, 410),
        (64, 2, 0.4, 0.5, 2458, None),
        (64, 2, 0.5, 0.8, 2048, None),
        (96, 4, 0.4, 0.95, 5530, 576),
        (128, 4, 0.4, 0.95, 9831, 1024),
    ],
)
def test_the_authors_table_of_gates(
    side: int, cell: int, ratio: float, agent_ratio: float, tokens: int, agents: int | None
) -> None:
    """Tokens left by the merge, and agents where they run at all."""
    asked: list[tuple[int, int]] = []

    class Spy(ReferenceBackend):
        def dense(self, call: AttentionCall) -> torch.Tensor:
            asked.append((call.query.shape[1], call.key.shape[1]))
            return torch.zeros_like(call.query)

    grid = TokenGrid(1, side, side)
    q, k, v = (torch.randn(1, grid.total, 1, 2) for _ in range(3))
    method = Agent(
        agents="matched", cell=(1, cell, cell), ratio=ratio, agent_ratio=agent_ratio, early=1.0
    )
    method.attend(AttentionCall(q, k, v, grid, features=q.flatten(2)), Spy())
    if agents is None:
        assert asked == [(tokens, tokens)]
    else:
        assert asked == [(agents, tokens), (tokens, agents)]


@pytest.mark.parametrize(("steps", "last"), [(50, 19), (10, 3), (4, 1), (1, 0), (0, 19)])
def test_agents_act_in_the_first_two_fifths_of_the_steps(steps: int, last: int) -> None:
    method = Agent()
    assert method.is_early(last, steps)
    assert not method.is_early(last + 1, steps)


def test_late_steps_are_dense_or_merged() -> None:
    call = replace(call_of(TokenGrid(1, 8, 8)), step=9)
    assert torch.equal(Agent().attend(call, BACKEND), BACKEND.dense(call))
    merged = Agent(late="tome", ratio=0.5).attend(call, BACKEND)
    assert torch.equal(merged, ToMe(ratio=0.5).attend(call, BACKEND))
    assert not torch.allclose(merged, BACKEND.dense(call))


@pytest.mark.parametrize(
    "method", [Agent(early=1.0), Agent(agents="matched", early=1.0), ToMe(cell=4)]
)
def test_frames_smaller_than_a_cell_and_too_many_agents_run_dense(method: Any) -> None:
    call = call_of(TokenGrid(1, 1, 2))
    assert torch.equal(method.attend(call, BACKEND), BACKEND.dense(call))


def test_merging_nothing_is_dense_to_the_bit() -> None:
    call = call_of(TokenGrid(1, 8, 8))
    assert torch.equal(ToMe(ratio=0.0).attend(call, BACKEND), BACKEND.dense(call))
    method = Agent(agents="matched", ratio=0.0, agent_ratio=0.1, early=1.0)
    assert torch.equal(method.attend(call, BACKEND), BACKEND.dense(call))
    alone = Agent(agents="matched", ratio=0.0, early=1.0).attend(call, BACKEND)
    assert not torch.allclose(alone, BACKEND.dense(call))  # agents without merging


def test_merged_attention_is_attention_over_the_clusters() -> None:
    """Tokens that are the same merge without loss: attention weighs a cluster as one token."""
    grid = TokenGrid(1, 8, 8)
    groups = torch.randn(1, 16, 2, 8, dtype=torch.float64)
    index = (torch.arange(8) // 2)[:, None] * 4 + torch.arange(8) // 2
    q, k, v = (torch.randn_like(groups) for _ in range(3))
    spread = [t[:, index.flatten()] for t in (q, k, v)]
    call = AttentionCall(*spread, grid, features=groups[:, index.flatten()].flatten(2))
    out = ToMe(ratio=0.75).attend(call, BACKEND)
    small = BACKEND.dense(AttentionCall(q, k, v, TokenGrid(1, 4, 4)))
    torch.testing.assert_close(out, small[:, index.flatten()])


def test_half_precision_survives_large_scores() -> None:
    grid = TokenGrid(1, 8, 8)
    q, k, v = (torch.randn(1, 64, 2, 64) * 30 for _ in range(3))
    call = AttentionCall(q.half(), k.half(), (v / 30).half(), grid)
    for method in (Agent(early=1.0), Agent(agents="matched", early=1.0), ToMe()):
        assert bool(method.attend(call, BACKEND).isfinite().all())


# -- pipelines


def clip(pipe: Any, name: str, **sizes: int) -> torch.Tensor:
    given = {**settings_for(name), "steps": 2, **sizes}
    return torch.from_numpy(generate(pipe, Settings(seed=3, **{**given, "prompt": "a cat"})).frames)


@pytest.mark.parametrize("name", ["agent", "tome"])
def test_stable_diffusion_runs_merged_at_full_resolution_only(name: str) -> None:
    pipe = load("tiny/sd")
    before = clip(pipe, "sd")
    with dittools.attach(pipe, name, backend="reference") as handle:
        changed = clip(pipe, "sd")
        report = handle.report()
    assert not torch.equal(changed, before)
    assert 0 < report.density < 1
    coarse = [reason for reason in report.fallbacks if "max_downsample" in reason]
    assert coarse
    assert torch.equal(clip(pipe, "sd"), before)
    hooks = [m for m in pipe.unet.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks


def test_sdxl_says_that_it_has_nothing_at_full_resolution() -> None:
    pipe = load("tiny/sdxl")
    before = clip(pipe, "sdxl")
    with dittools.attach(pipe, "tome", backend="reference") as handle:
        assert torch.equal(clip(pipe, "sdxl"), before)
        report = handle.report()
    assert report.density == 1
    assert any("max_downsample" in reason for reason in report.fallbacks)
    with dittools.attach(pipe, ToMe(max_downsample=2), backend="reference"):
        assert not torch.equal(clip(pipe, "sdxl"), before)


@pytest.mark.parametrize(
    ("family", "side"),
    [("sd3", 32), ("flux", 32), ("wan", 64), ("pixart", 32), ("qwen_image", 64), ("cogvideox", 64)],
)
def test_transformers_hand_over_the_query_before_rope(family: str, side: int) -> None:
    """The phases are found, so no call is refused for want of them or for an unknown rotation."""
    pipe = load(f"tiny/{family}")
    before = clip(pipe, family, height=side, width=side)
    method = Agent(cell=(2, 4, 4), early=1.0)
    with dittools.attach(pipe, method, dense_steps=0, backend="reference") as handle:
        changed = clip(pipe, family, height=side, width=side)
        report = handle.report()
    assert not torch.equal(changed, before)
    assert not [r for r in report.fallbacks if "needs" in r or "follow" in r], report.fallbacks
    assert report.density < 1
    assert torch.equal(clip(pipe, family, height=side, width=side), before)


def test_without_its_input_a_method_runs_dense_and_says_so() -> None:
    pipe = load("tiny/sd")
    before = clip(pipe, "sd")
    with dittools.attach(pipe, "tome", backend="reference") as handle:
        for module in pipe.unet.modules():
            module._forward_pre_hooks = type(module._forward_pre_hooks)(
                (k, h) for k, h in module._forward_pre_hooks.items() if "Tap" not in str(type(h))
            )
        assert torch.equal(clip(pipe, "sd"), before)
        assert any("needs the input" in r for r in handle.report().fallbacks)


def test_copies_share_the_taps_and_pickles_leave_them_out() -> None:
    pipe = load("tiny/sd")
    with dittools.attach(pipe, "tome", backend="reference"):
        twin = copy.deepcopy(pipe.unet)
        loaded = pickle.loads(pickle.dumps(pipe.unet))
        x, t = torch.randn(1, 4, 16, 16), torch.tensor(5)
        text = torch.randn(1, 7, pipe.unet.config.cross_attention_dim)
        out = [m(x, t, text).sample for m in (pipe.unet, twin, loaded)]
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[2], pipe.unet(x, t, text).sample)
    assert not torch.equal(out[0], out[2])


def test_agents_early_and_a_plan_late_make_one_plan() -> None:
    pipe = load("tiny/sd3")
    late = dittools.METHODS["random"](density=0.5, block_size=16)
    early = Agent(cell=(1, 4, 4), early=1.0)
    plan = dittools.Plan(
        rules=(Rule(early, steps=(0.0, 0.5)), Rule(late, steps=(0.5, 1.0))),
    )
    densities = []
    for some in (plan, dittools.Plan.of(early), dittools.Plan.of(late)):
        with dittools.attach(pipe, some, backend="reference") as handle:
            clip(pipe, "sd3", height=32, width=32, steps=4)
            densities.append(handle.report().density)
            assert handle.report().fallbacks == {}
    assert densities[0] == pytest.approx((densities[1] + densities[2]) / 2)
    assert densities[1] != pytest.approx(densities[2])


@pytest.mark.parametrize(
    ("method", "params"),
    [
        (Agent, {"cell": (1, 4)}),
        (Agent, {"cell": (1, 0, 4)}),
        (Agent, {"early": 0.0}),
        (Agent, {"agents": "some"}),
        (Agent, {"ratio": 1.5}),
        (Agent, {"shortcut": -1.0}),
        (ToMe, {"ratio": -0.1}),
        (ToMe, {"cell": 0}),
    ],
)
def test_bad_parameters_are_named(method: Any, params: dict[str, Any]) -> None:
    with pytest.raises(dittools.errors.InputError, match=next(iter(params))):
        method(**params)
