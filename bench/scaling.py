"""Scaling of one clip over 1 to 64 GPUs: simulated from formulas, checked against real ranks.

    python bench/scaling.py                       all of it; about a minute
    python bench/scaling.py --keep-measured       the simulation alone, with other assumptions:
        --attention-tflops 800 --network "ours:8:400:25" --densities 1 0.25
    python bench/scaling.py --page                docs/scaling.md from docs/results/scaling.json

The bytes that gloo ranks hand over on this CPU are counted and compared with the formula; the
script fails when they differ. Times come from assumed speeds alone.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import configs
import scaling_page
from scaling_model import (
    NETWORKS,
    Denoiser,
    Hardware,
    Network,
    announced,
    critical_density,
    crossing,
    estimate,
    exchanged,
    fitting,
    gathered,
    halo_bytes,
    least_slowest,
    mode_of,
)
from ulysses_ranks import run_ranks

from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.patches.halo import find_bands
from dittools.patches.split import Split, piece
from dittools.plans import Plan
from dittools.plans.balance import assign, head_work, in_order, plan_balance, slowest

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/scaling.json", ROOT / "docs/scaling.md"
PLANS = ("docs/plans/demo-0.4.json", "docs/plans/demo-0.4-fast.json")
RANKS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 64)
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1)
DEMO_GRID = TokenGrid(13, 12, 12)
WAN_CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
FLUX_CALL = {"height": 16, "width": 16, "num_inference_steps": 2}
DEMO_CALL = {
    "prompt": "a red circle",
    "height": 96,
    "width": 96,
    "num_frames": 12,
    "num_inference_steps": 1,
    "guidance_scale": 4.0,
}


@dataclass(frozen=True)
class Measured:
    """One run on real ranks, and the sizes the formula needs.

    Attributes:
        name: for the page.
        ranks: gloo processes.
        job: of `ulysses_ranks.py`.
        streams: tokens that are split each for itself: text and image, or the video.
        heads, head_dim: of the denoiser.
        width: values of a token in its result, which holds the last stream.
        attentions, forwards: that ran over the split sequence.
    """

    name: str
    ranks: int
    job: dict[str, Any]
    streams: tuple[int, ...]
    heads: int
    head_dim: int
    width: int
    attentions: int
    forwards: int

    @property
    def is_anything(self) -> bool:
        """Whether it runs as Ulysses Anything."""
        return bool(self.job.get("anything"))

    def formula(self, rank: int) -> dict[str, int]:
        """Return the bytes a rank sends, by collective; fp32."""
        ranks, tokens = self.ranks, sum(self.streams)
        local = sum(piece(stream, rank, ranks) for stream in self.streams)
        slots = -(-self.heads // ranks)
        each = exchanged(local, tokens, slots, self.head_dim, ranks, 4)
        result = gathered(piece(self.streams[-1], rank, ranks), self.width, ranks, 4)
        lengths = announced(ranks, self.attentions, self.forwards) if self.is_anything else 0
        return {
            "all_to_all": round(each) * self.attentions,
            "all_gather": result * self.forwards + lengths,
        }


def cases() -> list[Measured]:
    """Return the runs: toy Wan and Flux, and the embedded model, whose 3 heads are uneven."""
    wan = {"family": "wan", "call": WAN_CALL}
    flux = {"family": "flux", "call": FLUX_CALL, "heads": 8}
    demo = {"family": "demo", "call": DEMO_CALL, "anything": True, "plan": str(ROOT / PLANS[1])}
    found = [Measured("embedded model, 3 heads", 2, demo, (1872,), 3, 64, 24, 12, 2)]
    for ranks in (2, 4):
        found += [
            Measured("toy Wan, 8 heads", ranks, {**wan, "heads": 8}, (48,), 8, 12, 64, 8, 4),
            Measured("toy Wan, 40 heads", ranks, {**wan, "heads": 40}, (48,), 40, 12, 64, 8, 4),
            Measured("toy Flux, 8 heads", ranks, flux, (16, 64), 8, 16, 4, 4, 2),
        ]
    return found


def measure(chosen: list[Measured]) -> list[dict[str, Any]]:
    """Return for every rank of every case the bytes by formula and as counted."""
    rows = []
    for ranks in sorted({case.ranks for case in chosen}):
        here = [case for case in chosen if case.ranks == ranks]
        with tempfile.TemporaryDirectory() as folder:
            plan = Plan.of(build("random", {"density": 0.4, "block_size": 8}))
            rule = {"plan": str(plan.save(Path(folder) / "plan.json"))}
            jobs = [{**rule, **case.job, "name": case.name} for case in here]
            found = run_ranks(Path(folder), jobs, ranks)
        rows += [
            _row(case, rank, one) for case in here for rank, one in enumerate(found[case.name])
        ]
    return rows


def _row(case: Measured, rank: int, one: dict[str, Any]) -> dict[str, Any]:
    formula = case.formula(rank)
    sent, dense = one["sent"], one["stock_sent"]
    return {
        "name": case.name,
        "ranks": case.ranks,
        "rank": rank,
        "mode": mode_of(case.heads, case.ranks),
        "formula": formula,
        "dense": {name: dense.get(name, 0) for name in formula},
        "sparse": {name: sent.get(name, 0) for name in formula},
        "beside": {name: n for name, n in sent.items() if name not in formula},
        "socket": one["socket"],
        "sparse_calls": one["report"]["calls"]["sparse"],
        "density": one["report"]["density"],
        "error": one["error"],
        "agrees": all(sent.get(n) == dense.get(n) == formula[n] for n in formula),
    }


HALO_CALL = {**FLUX_CALL, "height": 20, "width": 24}
HALO_GRID = TokenGrid(1, 10, 12, 16)


def measure_halo() -> list[dict[str, Any]]:
    """Return for every rank of toy Flux the bytes of a halo exchange by formula and as counted."""
    method, rows, forwards = build("clear", {"radius": 2.0, "block_size": 8}), [], 2
    for ranks in (2, 4):
        bands = find_bands(Split((HALO_GRID,), (16, 120), ranks), [method])
        with tempfile.TemporaryDirectory() as folder:
            plan = str(Plan.of(method).save(Path(folder) / "plan.json"))
            job = {"name": "halo", "family": "flux", "heads": 8, "call": HALO_CALL}
            found = run_ranks(Path(folder), [{**job, "plan": plan, "exchange": "halo"}], ranks)
        for rank, one in enumerate(found["halo"]):
            each = halo_bytes(bands, rank, 8, 16, 4)
            result = gathered(120 // ranks, 4, ranks, 4) * forwards
            formula = {"send": 4 * each["send"], "all_gather": 4 * each["all_gather"] + result}
            counted = {name: one["sent"].get(name, 0) for name in formula}
            rows.append(
                {
                    "ranks": ranks,
                    "rank": rank,
                    "formula": formula,
                    "counted": counted,
                    "ulysses": one["stock_sent"],
                    "error": one["error"],
                    "agrees": counted == formula and "all_to_all" not in one["sent"],
                }
            )
    return rows


def simulate_halo(ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return what a rank of FLUX.1-dev sends for one attention of a 4096 x 4096 image, bf16."""
    case = next(case for case in configs.RELEASED if case.name == "flux-4096")
    heads, head_dim = case.config["num_attention_heads"], case.config["attention_head_dim"]
    side, text = case.latent[1] // 2, case.text_tokens
    grid, found = TokenGrid(1, side, side, text), []
    for count in ranks[1:]:
        row: dict[str, Any] = {"ranks": count, "mode": mode_of(heads, count)}
        tokens = grid.total
        row["ulysses"] = exchanged(tokens / count, tokens, heads / count, head_dim, count, 2)
        for radius in (8.0, 16.0, 32.0):
            bands = find_bands(
                Split((grid,), (text, grid.tokens), count), [build("clear", {"radius": radius})]
            )
            sent = (halo_bytes(bands, rank, heads, head_dim, 2) for rank in range(count))
            row[f"{radius:g}"] = max(sum(one.values()) for one in sent)
        found.append(row)
    return found


def simulate(
    model: Denoiser,
    hardware: Hardware,
    networks: tuple[Network, ...],
    ranks: tuple[int, ...],
    densities: tuple[float, ...],
) -> dict[str, Any]:
    """Return what a rank sends and computes, and where sending takes longer."""
    rows = [
        {**asdict(estimate(model, n, d, hardware, net)), "density": d, "network": net.name}
        for net in networks
        for d in densities
        for n in ranks
    ]
    times = {"attention": lambda e: e.attention_ms, "all": lambda e: e.compute_ms}
    crossings = [
        {
            "network": net.name,
            "density": d,
            **{
                of: crossing(model, d, hardware, net, max(ranks), time)
                for of, time in times.items()
            },
        }
        for net in networks
        for d in densities
    ]
    critical = [
        {
            "network": net.name,
            "ranks": n,
            "attention": critical_density(model, n, hardware, net, whole=False),
            "all": critical_density(model, n, hardware, net, whole=True),
        }
        for net in networks
        for n in ranks
        if n > 1
    ]
    return {
        "rows": rows,
        "crossings": crossings,
        "critical": critical,
        "groups": {str(n): fitting(model.heads, n) for n in ranks},
        "padded": [n for n in range(2, 65) if mode_of(model.heads, n) == "ulysses_anything"],
    }


def balances() -> dict[str, Any]:
    """Return how the committed plans fall on ranks, and 40 heads with the densities of theirs."""
    own, drawn = [], []
    for path in PLANS:
        plan = Plan.load(ROOT / path)
        for ranks in (2, 3):
            found = plan_balance(plan, DEMO_GRID, layers=6, heads=3, steps=12, ranks=ranks)
            own.append({"plan": path, **asdict(found)})
        works = layer_works(plan)
        layers = [tuple(random.Random(n).choices(sum(works, ()), k=40)) for n in range(40)]
        for ranks in (2, 4, 5, 8, 10, 20):
            drawn.append({"plan": path, "ranks": ranks, **_drawn(layers, ranks)})
    return {"plans": own, "drawn": drawn}


def layer_works(plan: Plan) -> list[tuple[float, ...]]:
    """Return the work of the 3 heads in each of the embedded model's 6 layers."""
    known = plan.measured["densities"]
    rules = [plan.rules_for(layer, "", 0, 12, 3, "") for layer in range(6)]
    return [head_work(rule, DEMO_GRID, 3, known) for rule in rules]


def _drawn(layers: list[tuple[float, ...]], ranks: int) -> dict[str, float]:
    """Return the slowest rank over the mean: over the run, in the worst layer, and at the least."""
    work = [sum(layer) for layer in layers]

    def mean(each: list[float]) -> float:
        return sum(one * w for one, w in zip(each, work, strict=True)) / sum(work)

    dealt = [slowest([(1.0, one)], assign(((1.0, one),), ranks), ranks) for one in layers]
    plain = [slowest([(1.0, one)], in_order(40, ranks), ranks) for one in layers]
    least = [least_slowest(one, ranks) for one in layers]
    return {
        "slowest": mean(dealt),
        "least": mean(least),
        "worst": max(dealt),
        "in_order": mean(plain),
    }


def wan_14b() -> Denoiser:
    """Return Wan 2.1 14B with 81 frames of 1280 x 720."""
    case = next(case for case in configs.RELEASED if case.name == "wan-14b-720p")
    sizes = case.config
    return Denoiser(
        case.tokens,
        sizes["num_attention_heads"],
        sizes["attention_head_dim"],
        sizes["num_layers"],
        sizes["ffn_dim"],
        case.text_tokens,
        sizes["text_dim"],
    )


def network(text: str) -> Network:
    """Read "name:GPUs in a node:GB/s inside:GB/s outside"."""
    try:
        name, node, inside, outside = text.rsplit(":", 3)
        made = Network(name, int(node), float(inside), float(outside))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"name:node:inside:outside, got {text!r}") from error
    if made.node < 1 or min(made.inside_gbs, made.outside_gbs) <= 0:
        raise argparse.ArgumentTypeError(f"positive numbers, got {text!r}")
    return made


def main() -> int:
    """Simulate, measure, write the numbers and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    usual = Hardware()
    for name, value in asdict(usual).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    parser.add_argument("--network", type=network, action="append", help="name:node:in:out")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--keep-measured", action="store_true", help="as in the file")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--page-out", type=Path, default=PAGE)
    given = parser.parse_args()
    if not given.page:
        hardware = Hardware(*(getattr(given, name) for name in asdict(usual)))
        networks, model = tuple(given.network or NETWORKS), wan_14b()
        old = json.loads(given.out.read_text(encoding="utf-8")) if given.keep_measured else {}
        found = {
            "model": {"name": "Wan 2.1 14B, 81 frames of 1280 x 720", **asdict(model)},
            "assumed": {**asdict(hardware), "networks": [asdict(net) for net in networks]},
            "simulated": simulate(model, hardware, networks, RANKS, tuple(given.densities)),
            "balance": balances(),
            "measured": old.get("measured") or measure(cases()),
            "halo": {
                "simulated": simulate_halo(RANKS),
                "measured": old.get("halo", {}).get("measured") or measure_halo(),
            },
        }
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    content = json.loads(given.out.read_text(encoding="utf-8"))
    given.page_out.write_text(scaling_page.page(content), encoding="utf-8")
    rows = [*content["measured"], *content["halo"]["measured"]]
    wrong = [row for row in rows if not row["agrees"]]
    for row in wrong:
        sys.stderr.write(f"not the formula: {row}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
