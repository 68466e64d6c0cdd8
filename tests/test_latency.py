"""Times add up, work is what the shapes say, bounds hold, results know what they can be held to."""

import copy
import json
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dittools.errors import InputError
from dittools.metrics import results as store
from dittools.metrics.latency import (
    PartTimer,
    PeakMemory,
    Sample,
    Spread,
    amdahl,
    interleaved,
    speedup,
    summary,
)
from dittools.metrics.work import Peak, WorkCounter, attention_flops, probe


def test_spread_is_numpys_percentiles() -> None:
    import numpy as np

    values = [5.0, 1.0, 9.0, 2.0, 7.0, 4.0]
    found = Spread.of(values)
    assert (found.p20, found.median, found.p80) == pytest.approx(
        tuple(np.percentile(values, [20, 50, 80]))
    )
    assert found.repeats == 6
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    with pytest.raises(InputError, match="nothing was measured"):
        Spread.of([])


def test_cases_alternate_and_warm_up_is_not_counted() -> None:
    order: list[str] = []

    def case(name: str) -> Sample:
        order.append(name)
        return Sample(float(len(order)), {})

    seen: list[tuple[str, int, int]] = []
    found = interleaved(
        {"dense": lambda: case("dense"), "gna": lambda: case("gna")},
        repeats=2,
        warm_up=1,
        tell=lambda *step: seen.append(step),
    )
    assert order == ["dense", "gna", "gna", "dense", "dense", "gna"]
    assert [s.total_ms for s in found["dense"]] == [4, 5]
    assert seen[-1] == ("runs", 6, 6)
    with pytest.raises(InputError, match="repeats are not usable"):
        interleaved({}, repeats=0, warm_up=1)


def test_speedup_compares_runs_of_the_same_turn() -> None:
    slow = [Sample(t, {}) for t in (100, 200, 300)]
    fast = [Sample(t, {}) for t in (50, 100, 150)]
    assert speedup(slow, fast) == Spread(2, 2, 2, 3)


class Toy(nn.Module):
    def forward(self, seconds: float) -> float:
        if seconds < 0:
            raise RuntimeError("broken on purpose")
        time.sleep(seconds)
        return seconds


class Vae:
    def decode(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_parts_are_timed_and_everything_is_as_before() -> None:
    toy, vae = Toy(), Vae()
    timer = PartTimer({"model": [(toy, "forward")], "vae": [(vae, "decode")]})
    with timer.running():
        toy(0.02)
        toy(0.02)
        vae.decode(0.05)
    found = timer.milliseconds()
    assert 40 <= found["model"] < found["vae"] + 30
    assert found["vae"] >= 50
    assert timer.calls("model") == 2
    assert not toy._forward_hooks
    assert not toy._forward_pre_hooks
    assert "decode" not in vars(vae)
    toy(0.0)
    assert timer.calls("model") == 2


def test_a_part_that_fails_is_closed_and_restored() -> None:
    toy = Toy()
    timer = PartTimer({"model": [(toy, "forward")]})
    with pytest.raises(RuntimeError, match="on purpose"), timer.running():
        toy(-1)
    assert timer.current == ""
    assert not toy._forward_pre_hooks
    with timer.running():
        toy(0.0)
    assert timer.calls("model") >= 1


def test_summary_keeps_the_largest_peak() -> None:
    rows = [Sample(10.0, {"vae": 4.0}, 100), Sample(20.0, {"vae": 6.0}, 300)]
    found = summary(rows)
    assert found["peak_bytes"] == 300
    assert found["parts_ms"]["vae"]["median"] == 5
    assert summary([Sample(1.0, {}, None)])["peak_bytes"] is None
    json.dumps(found, allow_nan=False)


def test_peak_memory_sees_what_was_freed() -> None:
    with PeakMemory() as none:
        pass
    # fresh pages: an allocator may hand out memory that was in use before
    with PeakMemory() as some, mmap.mmap(-1, 64 * 2**20) as block:
        block.write(b"1" * 64 * 2**20)
    if none.bytes is None or some.bytes is None:
        pytest.skip("this system cannot reset the peak of a process")
    assert some.bytes - none.bytes >= 60 * 2**20


@pytest.mark.parametrize(
    ("share", "density", "bound"),
    [(0.0, 0.0, 1.0), (0.5, 0.0, 2.0), (0.5, 0.5, 4 / 3), (0.8, 0.25, 2.5), (0.9, 1.0, 1.0)],
)
def test_amdahl(share: float, density: float, bound: float) -> None:
    assert amdahl(share, density) == pytest.approx(bound)


def test_amdahl_has_no_bound_without_a_rest_and_refuses_nonsense() -> None:
    assert amdahl(1.0) == float("inf")
    for share, density in ((1.1, 0.0), (0.5, -0.1)):
        with pytest.raises(InputError):
            amdahl(share, density)


# -- work


def test_work_is_what_the_shapes_say() -> None:
    linear, conv = nn.Linear(32, 48), nn.Conv2d(3, 8, 3)
    q, k = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 7, 16)
    part = [""]
    with torch.no_grad(), WorkCounter(lambda: part[0]) as counter:
        part[0] = "transformer"
        linear(torch.randn(2, 10, 32))
        nn.functional.scaled_dot_product_attention(q, q, q)
        nn.functional.scaled_dot_product_attention(q, k, k)  # cross-attention
        part[0] = "vae"
        conv(torch.randn(1, 3, 10, 10))
        nn.functional.scaled_dot_product_attention(q, q, q)  # not the denoiser's
    work = counter.work
    own = 2 * 2 * 4 * 10 * 10 * (16 + 16)
    assert work.attention == own == attention_flops(q.shape, q.shape, 16)
    assert work.other["transformer"] == 2 * 20 * 32 * 48 + own * 7 // 10
    assert work.other["vae"] == 2 * 8 * 8 * 8 * 27 + own
    assert work.flops(0.5) == work.flops() - own / 2
    assert work.attention_bytes == 4 * q.nbytes
    assert work.bytes["vae"] >= conv.weight.nbytes + 4 * q.nbytes


def test_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    peak = Peak(flops_per_s=1e9, bytes_per_s=1e8, how="")
    assert peak.limit_ms(flops=2e9, traffic=1e7) == 2000
    assert peak.limit_ms(flops=1e6, traffic=1e8) == 1000


def test_probe_measures_something_this_machine_can_do() -> None:
    found = probe()
    assert 1e8 < found.flops_per_s < 1e15
    assert 1e7 < found.bytes_per_s < 1e13


# -- a whole bench on a toy pipeline


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    from dittools.commands.latency import Bench, run_latency
    from dittools.pipelines import load
    from dittools.pipelines.generate import Settings
    from dittools.pipelines.tiny import settings_for

    out = tmp_path_factory.mktemp("bench")
    settings = Settings(**{"prompt": "a cat", **settings_for("wan"), "steps": 2})
    bench = Bench(
        "tiny/wan",
        settings,
        {"sta": "sta"},
        repeats=2,
        warm_up=0,
        backend="reference",
        options={"dense_steps": 0, "dense_layers": 0},
    )
    pipe = load("tiny/wan")
    pipe.set_progress_bar_config(disable=True)
    return out, run_latency(pipe, bench, out)


def test_a_bench_writes_what_it_returns(measured: tuple[Path, dict[str, Any]]) -> None:
    out, results = measured
    assert store.load_results(out / "results.json") == json.loads(json.dumps(results))
    assert [case["name"] for case in results["cases"]] == ["dense", "sta"]
    for case in results["cases"]:
        assert (out / case["clip"]).is_file()
        assert len(case["plan_checksum"]) == 16
        spent = sum(part["median"] for part in case["parts_ms"].values())
        assert spent == pytest.approx(case["total_ms"]["median"], rel=0.3)
        assert case["parts_ms"]["attention"]["median"] > 0
        assert case["parts_ms"]["vae"]["median"] > 0
        assert case["parts_ms"]["text encoder"]["median"] > 0
        assert case["limit_ms"] > 0
    dense, fast = results["cases"]
    assert dense["speedup"]["median"] == 1
    assert dense["fidelity"] is None
    assert dense["plan_checksum"] != fast["plan_checksum"]
    assert 1 <= fast["bound_at_density"] <= fast["bound"]
    assert set(results["floors"]) == {"another seed", "random blocks as sta"}
    assert results["floors"]["another seed"]["psnr_db"] < 60


def test_work_of_a_bench_scales_with_the_steps(measured: tuple[Path, dict[str, Any]]) -> None:
    from dittools.commands.latency import count_work
    from dittools.pipelines import load
    from dittools.pipelines.generate import Settings
    from dittools.pipelines.tiny import settings_for

    pipe = load("tiny/wan")
    pipe.set_progress_bar_config(disable=True)
    settings = Settings(**{"prompt": "a cat", **settings_for("wan"), "steps": 6})
    six, two = count_work(pipe, settings), measured[1]["work"]
    assert six.attention == pytest.approx(3 * two["attention"])
    assert six.other["transformer"] == pytest.approx(3 * two["other"]["transformer"])
    assert six.other["vae"] == two["other"]["vae"]


def test_cases_of_one_name_are_refused_not_dropped(tmp_path: Path) -> None:
    from dittools.commands.bench import _targets
    from dittools.plans import Plan

    def plan(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Plan().save(path)
        return path

    one, two = plan("a/mine.json"), plan("b/mine.json")
    assert set(_targets(["gna", "dense"], [one])) == {"gna", "mine"}
    spaced = [plan("a/my plan.json"), plan("a/my_plan.json")]  # their clips would be one file
    for methods, plans in (
        (None, [one, two]),
        (["gna"], [plan("gna.json")]),
        (["gna"], [plan("dense.json")]),
        (None, spaced),
    ):
        with pytest.raises(InputError, match="two cases have one name"):
            _targets(methods, plans)


def test_a_method_that_loses_is_said_to_lose() -> None:
    from dittools.commands.bench import verdicts

    def case(name: str, *times: float) -> dict[str, Any]:
        return {"name": name, "speedup": Spread.of(times).to_dict()}

    cases = [
        case("dense", 1.0, 1.0),
        case("fast", 1.2, 1.3, 1.4),
        case("same", 0.98, 1.01, 1.03),
        case("slow", 0.7, 0.8, 0.9),
        case("once", 0.5),
    ]
    assert verdicts({"cases": cases}) == [
        "same is not faster than dense beyond the spread: 1.01 (0.99-1.02)",
        "slow is slower than dense here: speed-up 0.80 (0.74-0.86)",
        "once is slower than dense here: speed-up 0.50 (0.50-0.50)",
    ]


# -- the results file


@pytest.fixture
def document(measured: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(measured[1])


def test_equal_runs_are_comparable_and_each_difference_is_named(document: dict[str, Any]) -> None:
    document["git"]["dirty"] = False
    assert store.reasons_not_comparable(document, document) == []
    changes = {
        ("run", "seed"): (7, "seed"),
        ("run", "steps"): (50, "steps"),
        ("run", "warm_up"): (3, "warm-up"),
        ("run", "device"): ("cuda", "device"),
        ("hardware", "gpu"): ("NVIDIA H200", "GPU"),
        ("versions", "torch"): ("9.9", "version of torch"),
    }
    for (part, key), (value, named) in changes.items():
        other = copy.deepcopy(document)
        other[part][key] = value
        reasons = store.reasons_not_comparable(document, other)
        assert len(reasons) == 1, key
        assert named in reasons[0]
        assert str(value) in reasons[0]
    other = copy.deepcopy(document)
    other["git"]["dirty"] = True
    assert "uncommitted" in store.reasons_not_comparable(document, other)[0]


def test_unusable_results_are_named(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match="cannot read results"):
        store.load_results(path)
    cases = {
        "{": "cannot read results",
        "[]": "holds no results",
        json.dumps({"format": "dittools-report"}): "holds no results",
        json.dumps({**document, "version": 99}): "another version",
        json.dumps({k: v for k, v in document.items() if k != "hardware"}): "incomplete.*hardware",
        json.dumps({**document, "cases": []}): "incomplete",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            store.load_results(path)


def test_provenance_names_machine_versions_and_revision() -> None:
    found = store.provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1
    revision = found["git"]["revision"]
    assert revision == "" or len(revision) == 40


def test_a_folder_outside_a_checkout_has_no_revision(tmp_path: Path) -> None:
    assert store.git_state(tmp_path) == {"revision": "", "dirty": False}


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "votes.json"
    store.write_atomic(path, "old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        store.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
