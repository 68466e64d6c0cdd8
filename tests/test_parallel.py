"""Context parallelism: a clip made by several ranks is the clip of one process."""

import itertools
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import OLD, SPARSE, shared

import dittools
from dittools.call import AttentionCall, Peers
from dittools.cli import main
from dittools.errors import InputError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.patches.adapters import Layout
from dittools.patches.refusals import RING, UNKNOWN_SPLIT
from dittools.patches.sites import ORIGINALS, SeamCall
from dittools.patches.split import Link, Split, find_split
from dittools.plans import Plan, Rule
from dittools.plans.balance import assign, capacities, head_work, in_order, plan_balance, slowest
from dittools.searching.forecast import forecast

ROOT = Path(__file__).parents[1]
WAN = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}  # 3 x 4 x 4 tokens
FLUX = {"height": 16, "width": 16, "num_inference_steps": 2}
SMALL = {"block_size": 8}


# --- heads to ranks


def test_ranks_get_equal_numbers_of_heads_and_the_last_one_what_is_left() -> None:
    assert capacities(40, 8) == (5,) * 8
    assert capacities(30, 8) == (4,) * 7 + (2,)  # as Ulysses Anything pads them
    assert in_order(6, 3) == (0, 0, 1, 1, 2, 2)
    with pytest.raises(InputError, match="10 heads cannot be spread over 8 ranks"):
        capacities(10, 8)


@pytest.mark.parametrize(("heads", "ranks"), [(40, 2), (40, 4), (40, 8), (24, 4)])
def test_the_slowest_rank_is_within_a_tenth_of_the_mean(heads: int, ranks: int) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        work = tuple(draw.uniform(0.05, 0.75) for _ in range(heads))
        owners = assign(((1.0, work),), ranks)
        assert [owners.count(rank) for rank in range(ranks)] == [heads // ranks] * ranks
        assert slowest([(1.0, work)], owners, ranks) <= 1.10


def test_no_assignment_is_much_better_than_the_one_found() -> None:
    for seed in range(12):
        draw = random.Random(seed)
        work = tuple(draw.choice((0.1, 0.3, 0.45, 1.0)) for _ in range(9))
        every = [
            tuple(0 if h in first else 1 if h in second else 2 for h in range(9))
            for first in itertools.combinations(range(9), 3)
            for second in itertools.combinations(sorted({*range(9)} - {*first}), 3)
        ]
        best = min(slowest([(1.0, work)], owners, 3) for owners in every)
        assert slowest([(1.0, work)], assign(((1.0, work),), 3), 3) <= best + 0.03


def test_heads_of_one_work_stay_in_order() -> None:
    assert assign(((50.0, (0.3,) * 8),), 4) == in_order(8, 4)


def test_phases_of_a_run_are_balanced_each() -> None:
    """Heads 0, 1 work in one half of the run, 2, 3 in the other: the sums say nothing."""
    phases = ((25.0, (1.0, 1.0, 0.1, 0.1)), (25.0, (0.1, 0.1, 1.0, 1.0)))
    assert slowest(phases, in_order(4, 2), 2) == pytest.approx(2.0 / 1.1)
    assert slowest(phases, assign(phases, 2), 2) == pytest.approx(1.0)


def test_work_is_counted_where_the_mask_is_known_and_asked_for_elsewhere() -> None:
    grid = TokenGrid(4, 8, 8)
    radial, sparge = build("radial", SMALL), build("sparge", {"density": 0.4, **SMALL})
    modes = build("sparse_vdit", {"mode": ("skip", "diagonal"), **SMALL})
    rules = [((0, 3), radial), ((1,), sparge), ((2, 4), modes), ((5,), build("dense", {}))]
    work = head_work(rules, grid, 6)
    share = radial.mask(grid).computed  # type: ignore[attr-defined]
    assert work[0] == work[3] == share < 1
    assert (work[1], work[2], work[5]) == (0.4, 0.0, 1.0)
    assert work[4] == modes.mask(grid, "diagonal").computed  # type: ignore[attr-defined]
    seen = {"sparge(density=0.4, block_size=8)": (0.2, 0.25)}
    assert head_work(rules, grid, 6, seen)[1] == 0.25


def test_a_forecast_says_how_ranks_share_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        '{"num_attention_heads": 8, "attention_head_dim": 8, "num_layers": 2,'
        ' "patch_size": [1, 2, 2]}'
    )
    rules = (Rule(build("radial", SMALL)), Rule(build("dense", {}), heads=(0, 1)))
    plan = Plan(rules).save(tmp_path / "plan.json")
    sizes = {"height": 128, "width": 128, "frames": 13, "steps": 2}
    found = forecast(tmp_path / "config.json", plan, **sizes, ranks=2)  # type: ignore[arg-type]
    assert found.balance is not None
    assert found.balance.slowest == 1.0 < found.balance.in_order
    assert found.to_dict()["balance"]["work"] == list(found.balance.work)
    assert "ranks              2, kept work" in str(found)
    words = [f"--{name}={value}" for name, value in sizes.items()]
    model, file = str(tmp_path / "config.json"), str(plan)
    command = ["forecast", "--model", model, "--plan", file, *words, "--ranks", "2"]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert f"ranks {found.balance}" in " ".join(capsys.readouterr().out.split())
    for ranks in (7, 0):
        with pytest.raises(InputError, match=f"8 heads cannot be spread over {ranks} ranks"):
            forecast(tmp_path / "config.json", plan, **sizes, ranks=ranks)  # type: ignore[arg-type]


def test_forecast_shows_the_work_of_ranks() -> None:
    rules = (Rule(build("radial", SMALL)), Rule(build("dense", {}), heads=(0, 1)))
    found = plan_balance(Plan(rules), TokenGrid(4, 8, 8), layers=2, heads=8, steps=4, ranks=2)
    share = build("radial", SMALL).mask(TokenGrid(4, 8, 8)).computed  # type: ignore[attr-defined]
    assert found.work == pytest.approx(((1 + 3 * share) / 4,) * 2)
    assert (found.slowest, found.worst) == (1.0, 1.0)
    assert found.in_order == pytest.approx((2 + 2 * share) / (1 + 3 * share))
    assert "above the mean" in str(found)
    assert "needs ulysses_anything" not in str(found)
    uneven = plan_balance(Plan(rules), TokenGrid(4, 8, 8), layers=1, heads=8, steps=1, ranks=3)
    assert "needs ulysses_anything" in str(uneven)


# --- tokens


def test_joint_sequences_stand_rank_by_rank() -> None:
    """Flux with 16 text and 32 image tokens on two ranks, as its processors hand it over."""
    split = Split((TokenGrid(1, 4, 8, 16),), (16, 32), 2)
    gathered = torch.cat([torch.arange(a, b) for a, b in ((0, 8), (16, 32), (8, 16), (32, 48))])
    assert torch.equal(split.true_order(gathered[None])[0], torch.arange(48))
    assert torch.equal(split.rank_order(torch.arange(48)[None])[0], gathered)


def test_uneven_pieces_are_found_by_the_length_of_this_ranks() -> None:
    layout = Layout((TokenGrid(1, 3, 3, 5),), streams=(5, 9))
    for rank, tokens in ((0, 2 + 3), (1, 2 + 3), (2, 1 + 3)):
        split = find_split(layout, "a", tokens, Link(None, rank, 3))
        assert split is not None
        assert [split.local(r) for r in range(3)] == [5, 5, 4]
        assert find_split(layout, "a", tokens + 1, Link(None, rank, 3)) is None


def test_a_video_without_text_is_in_order_and_unknown_text_is_refused() -> None:
    split = find_split(Layout((TokenGrid(2, 3, 4),)), "a", 12, Link(None, 0, 2))
    tokens = torch.arange(24)[None]
    assert split is not None
    assert split.true_order(tokens) is tokens
    with pytest.raises(UnsupportedCall, match=UNKNOWN_SPLIT):
        find_split(Layout((TokenGrid(2, 3, 4, text_after=8),)), "a", 16, Link(None, 0, 2))


# --- methods that look beyond their own heads


@dataclass
class Others:
    """Hands a call of some heads what all heads would have."""

    whole: AttentionCall
    picked: tuple[int, ...]
    asked: list[torch.Tensor] = field(default_factory=list)

    def call(self, gathered: list[torch.Tensor]) -> AttentionCall:
        left = iter(gathered)

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            self.asked.append(tensor)
            found = next(left)
            batch = found.shape[0] // self.whole.head_count
            rows = [b * self.whole.head_count + h for b in range(batch) for h in self.picked]
            assert torch.allclose(found[rows], tensor.reshape(found[rows].shape), atol=1e-5)
            return found

        peers = Peers(self.whole.head_count, self.picked, gather)
        return replace(self.whole.heads(self.picked), peers=peers, memory={})


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("random", {"density": 0.4}),
        ("paro", {"order": ("fhw", "wfh", "hwf", "fwh"), "per_head": True}),
        ("sparse_vdit", {"mode": ("diagonal", "full", "stripe", "skip")}),
        ("sparge", {}),
    ],
)
def test_some_heads_run_as_they_would_among_all(method: str, params: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 96, 4, 16), generator=generator) for _ in range(3))
    call = AttentionCall(q, k, v, TokenGrid(4, 4, 6))
    runner, chosen = dittools.kernels.load("reference"), build(method, {**SMALL, **params})
    whole = chosen.attend(call, runner)
    part = chosen.attend(Others(call, (1, 3)).call([]), runner)
    assert torch.allclose(part, whole[:, :, [1, 3]], atol=1e-6)


def test_gathering_over_folded_items_keeps_items_apart() -> None:
    values = torch.arange(12.0).view(2, 6)  # item, head
    peers = Peers(6, (1, 4), lambda own: values.t().contiguous() if own.shape[0] == 2 else own)
    folded = peers.folded(2)
    assert (folded.count, folded.own) == (12, (1, 4, 7, 10))
    assert torch.equal(folded.gather(values[:, [1, 4]].flatten()), values.flatten())


# --- refusals


def _split_call(config: Any, heads: int = 4) -> tuple[SeamCall, list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []

    def stock(query: torch.Tensor, key: Any, value: Any, **options: Any) -> torch.Tensor:
        asked.append(options)
        return query + 1

    number = ORIGINALS.add(stock, heads_first=False)
    tensor = torch.randn(1, 8, heads, 8)
    options = {"parallel_config": SimpleNamespace(context_parallel_config=config)}
    return SeamCall(tensor, tensor, tensor, options, number), asked


def _attended(config: Any, heads: int = 4) -> tuple[torch.Tensor, SeamCall, Any]:
    pipe = shared("wan")
    with dittools.attach(pipe, Plan.of(SPARSE)) as handle:
        root = dittools.patches.install.root_of(pipe.transformer)
        root.begin(pipe.transformer, (), {"hidden_states": torch.zeros(1, 16, 1, 8, 8)})
        call, asked = _split_call(config, heads)
        out = root.attend(root.sites[0], call)
        assert asked == [call.options]
        return out, call, handle.report()


@pytest.mark.parametrize("ulysses", [1, 2])
def test_ring_stays_with_stock_attention_and_the_report_says_why(ulysses: int) -> None:
    config = SimpleNamespace(ring_degree=2, ulysses_degree=ulysses)
    out, call, report = _attended(config)
    assert torch.equal(out, call.query + 1)
    assert report.fallbacks == {RING: 1}
    assert "ulysses_degree" in str(report)


def test_heads_that_ranks_cannot_share_are_refused_clearly() -> None:
    config = SimpleNamespace(ring_degree=1, ulysses_degree=3)
    with pytest.raises(UnsupportedCall, match=r"4 heads .* evenly over 3 .*degree of 2, 4; got 3"):
        _attended(config)
    padded = SimpleNamespace(ring_degree=1, ulysses_degree=3, ulysses_anything=True)
    with pytest.raises(UnsupportedCall, match="4 heads cannot be spread"):  # 2, 2 and none
        _attended(padded)


# --- real ranks


def _plan(folder: Path, name: str, *rules: tuple[str, dict[str, Any], Any]) -> str:
    made = Plan(tuple(Rule(build(m, {**SMALL, **p}), heads=heads) for m, p, heads in rules))
    return str(made.save(folder / f"{name.replace(' ', '_')}.json"))


def _run(folder: Path, jobs: list[dict[str, Any]], ranks: int) -> dict[str, list[Any]]:
    """Return for each job what every rank found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        from ulysses_ranks import run_ranks
    return run_ranks(folder, jobs, ranks)  # type: ignore[no-any-return]


MIXED = {
    "wan": [("radial", {}, (0, 3)), ("random", {"density": 0.4}, (1, 4, 5))],
    "flux": [("clear", {"radius": 2.0}, (0, 3)), ("random", {"density": 0.4}, (1, 2, 5))],
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """One start of two ranks for all the fast cases."""
    if OLD:
        pytest.skip("diffusers is too old")
    folder = tmp_path_factory.mktemp("two")
    wan = {"family": "wan", "heads": 8, "call": WAN}
    flux = {"family": "flux", "heads": 8, "call": FLUX}
    coupled = [("paro", {"density": 0.3}, (0, 1, 2, 5, 6, 7))]
    jobs = [
        {"name": "wan mixed", **wan, "plan": _plan(folder, "wan", *MIXED["wan"])},
        {"name": "flux mixed", **flux, "plan": _plan(folder, "flux", *MIXED["flux"])},
        {"name": "wan paro", **wan, "plan": _plan(folder, "paro", *coupled)},
        {"name": "wan nan", **wan, "nan": True, "plan": _plan(folder, "nan", *coupled)},
        {"name": "flux tome", **flux, "method": "tome"},
        {"name": "wan dense", **wan, "method": "dense"},
    ]
    uneven = _plan(folder, "uneven", ("random", {"density": 0.4}, (0, 1, 3, 4)))
    odd = {"family": "wan", "heads": 5, "call": {**WAN, "height": 48}, "plan": uneven}
    jobs += [{"name": "wan anything", **odd, "anything": True}]
    jobs += [{"name": "wan uneven", **odd, "stock": False}]
    return _run(folder, jobs, 2)


def _equal(found: list[dict[str, Any]], sparse: int) -> None:
    for rank, one in enumerate(found):
        assert one["error"] < 2e-6, (rank, one["error"])
        assert one["stock_error"] < 2e-6
        assert one["restored_error"] == 0
        assert one["sparse_gap"] > 1e-4  # far from dense
        assert one["report"]["calls"]["sparse"] == sparse
        assert one["report"]["fallbacks"] == one["single"]["fallbacks"]
        assert f"rank {rank} of {len(found)}" in one["text"]


@pytest.mark.parametrize(
    ("name", "sparse"),
    [("wan mixed", 8), ("flux mixed", 4), ("wan paro", 8), ("flux tome", 2), ("wan anything", 8)],
)
def test_two_ranks_make_the_clip_of_one(
    two: dict[str, list[dict[str, Any]]], name: str, sparse: int
) -> None:
    _equal(two[name], sparse)


def test_a_dense_plan_leaves_the_exchange_to_diffusers(
    two: dict[str, list[dict[str, Any]]],
) -> None:
    for one in two["wan dense"]:
        assert one["sent"] == one["stock_sent"]
        assert one["error"] == one["stock_error"] < 2e-6


def test_not_finite_inputs_of_one_rank_leave_all_dense(
    two: dict[str, list[dict[str, Any]]],
) -> None:
    """The method exchanges what its heads know: a rank that went its own way would wait forever."""
    for one in two["wan nan"]:
        assert one["report"]["calls"] == {"sparse": 0, "dense": 8, "passed_through": 0}
        assert list(one["report"]["fallbacks"].values()) == [8]


def test_uneven_heads_are_refused_on_every_rank(two: dict[str, list[dict[str, Any]]]) -> None:
    for one in two["wan uneven"]:
        assert "5 heads cannot be spread evenly over 2" in one["refused"]
        assert "ulysses_anything=True" in one["refused"]


def test_heads_are_dealt_out_so_that_both_ranks_have_equal_work(
    two: dict[str, list[dict[str, Any]]],
) -> None:
    shares = [one["report"]["density"] for one in two["wan mixed"]]
    whole = two["wan mixed"][0]["single"]["density"]
    assert sum(shares) / 2 == pytest.approx(whole)
    assert max(shares) / whole <= 1.10


def test_a_rank_sends_what_the_formula_says(two: dict[str, list[dict[str, Any]]]) -> None:
    """Query, key, value and result of half the tokens, of which half the heads leave the rank."""
    calls, tokens, heads, head_dim, out = 8, 48, 8, 12, 64
    exchanged = calls * 4 * (tokens // 2) * heads * head_dim * 4 // 2
    gathered = 4 * (tokens // 2) * out * 4  # four forwards, channels of proj_out, fp32
    for one in two["wan mixed"]:
        assert one["sent"] == {
            "all_to_all": exchanged,
            "all_gather": gathered,
            "all_reduce": calls * 4,
        }
        assert one["stock_sent"] == {"all_to_all": exchanged, "all_gather": gathered}
        payload = exchanged + gathered
        assert payload < one["stock_socket"] < 1.1 * payload  # what TCP really carried


@pytest.mark.slow
def test_four_ranks_make_the_clip_of_one(tmp_path: Path) -> None:
    if OLD:
        pytest.skip("diffusers is too old")
    jobs: list[dict[str, Any]] = []
    calls: dict[str, dict[str, Any]] = {
        "wan": {"heads": 8, "call": WAN},
        "flux": {"heads": 8, "call": FLUX},
        "flux2": {"heads": 8, "call": FLUX},
        "qwen_image": {
            "heads": 8,
            "call": {
                **FLUX,
                "height": 64,
                "width": 64,
                "negative_prompt": "a cat on a blue square",
            },
            "anything": True,
        },
    }
    methods: dict[str, dict[str, Any]] = {
        "paro": {"density": 0.3},
        "sparse_vdit": {"threshold": 10.0},
        "svg2": {"least_queries": 4, "least_keys": 4, "key_block": 8},
        "sparge": {},
        "svg": {},
    }
    for family, settings in calls.items():
        rules = MIXED.get(family, MIXED["flux"])
        plan = _plan(tmp_path, f"{family} mixed", *rules)
        jobs.append({"name": f"{family} mixed", "family": family, **settings, "plan": plan})
    for family, (method, params) in itertools.product(("wan", "flux"), methods.items()):
        plan = _plan(tmp_path, f"{family} {method}", (method, params, "all"))
        name = f"{family} {method}"
        jobs.append({"name": name, "family": family, **calls[family], "plan": plan})
    for name, found in _run(tmp_path, jobs, 4).items():
        for rank, one in enumerate(found):
            assert one["error"] < 3e-6, (name, rank, one["error"])
            calls, single = one["report"]["calls"], one["single"]["calls"]
            if name.endswith("sparse_vdit"):  # a rank all of whose heads chose `full` runs dense
                assert sum(calls.values()) == sum(single.values()), (name, rank)
                assert calls["sparse"] <= single["sparse"] == 4 + 4 * ("wan" in name), (name, rank)
            else:
                assert calls == single, (name, rank)
        most = max(one["report"]["calls"]["sparse"] for one in found)
        assert bool(most) == bool(found[0]["single"]["calls"]["sparse"]) == (name != "flux svg")
        assert name.endswith("mixed") <= (found[0]["sparse_gap"] > 1e-4), name
