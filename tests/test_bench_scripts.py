"""The benchmark scripts: released shapes are right, one shrunken case runs, ratios are compared."""

import copy
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules configs, latency and check, as `python bench/latency.py` sees them."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("configs", "latency", "check"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import check
    import configs
    import latency

    return configs, latency, check


def test_released_sizes_have_their_known_token_counts(scripts: tuple[ModuleType, ...]) -> None:
    found = {case.name: case.tokens for case in scripts[0].RELEASED}
    assert found == {
        "wan-1.3b-480p": 32_760,
        "wan-1.3b-720p": 75_600,
        "wan-14b-480p": 32_760,
        "wan-14b-720p": 75_600,
        "hunyuan-video-720p": 118_800,
        "cogvideox-5b-480p": 17_550,
        "flux-1024": 4_096,
        "flux-2048": 16_384,
        "flux-4096": 65_536,
    }


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("wan-1.3b-480p", 1.42),
        ("wan-14b-480p", 14.3),
        ("hunyuan-video-720p", 12.8),
        ("cogvideox-5b-480p", 5.57),
        ("flux-1024", 11.9),
    ],
)
def test_configs_have_the_released_number_of_weights(
    scripts: tuple[ModuleType, ...], name: str, billions: float
) -> None:
    import diffusers

    case = next(case for case in scripts[0].RELEASED if case.name == name)
    with torch.device("meta"):
        model = getattr(diffusers, case.kind)(**case.config)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count == pytest.approx(billions, rel=0.02)


def test_a_shrunken_case_runs_and_goes_on_where_it_was(
    scripts: tuple[ModuleType, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dittools.metrics.results import load_results

    latency = scripts[1]
    words = ["--shrunk", "--only", "wan-1.3b-480p", "--repeats", "1", "--warm-up", "0"]
    monkeypatch.setattr(sys, "argv", ["latency.py", *words, "--out", str(tmp_path)])
    latency.main()
    path = tmp_path / "wan-1.3b-480p-shrunk.json"
    found = load_results(path)
    assert [case["name"] for case in found["cases"]][:2] == ["dense", "radial"]
    assert all(case["report"]["coverage"]["fired"] == 1 for case in found["cases"])
    assert found["work"]["attention"] == 4 * found["run"]["tokens"] ** 2 * 2 * 128
    assert path.with_suffix(".svg").exists()
    assert "wan-1.3b-480p-shrunk" in capsys.readouterr().out
    monkeypatch.setattr(latency, "measure", None)  # calling it again would fail
    latency.main()
    assert "radial" in capsys.readouterr().out


def test_only_ratios_are_compared_and_what_moved_is_named(
    scripts: tuple[ModuleType, ...],
) -> None:
    check = scripts[2]
    before = {"wan": {"gna": {"speedup": 2.0, "attention_speedup": 4.0, "density": 0.3}}}
    assert check.moved(before, before) == ([], [], [])
    now = copy.deepcopy(before)
    now["wan"]["gna"]["speedup"] = 1.9  # within the noise
    assert check.moved(before, now) == ([], [], [])
    now["wan"]["gna"]["speedup"] = 1.5
    worse, better, _ = check.moved(before, now)
    assert worse == ["wan, gna: speedup 2.000 -> 1.500 (-25%)"]
    assert better == []
    now["wan"]["gna"] |= {"speedup": 3.0, "density": 0.31}
    worse, better, _ = check.moved(before, now)
    assert [text.split(":")[1].split()[0] for text in (*worse, *better)] == ["density", "speedup"]
    assert check.moved(before, {"flux": {}})[2] == [
        "wan, gna: not measured",
        "flux: not in the reference",
    ]


def test_ratios_do_not_depend_on_the_speed_of_the_machine(
    scripts: tuple[ModuleType, ...],
) -> None:
    def case(ms: float, attention: float, speed: float, flops: float) -> dict[str, object]:
        return {
            "name": "gna",
            "speedup": {"median": speed},
            "parts_ms": {"attention": {"median": attention}, "choosing": {"median": 0.0}},
            "density": 0.25,
            "flops": flops,
            "total_ms": {"median": ms},
        }

    fast = {"cases": [case(100, 80, 1, 8e9), case(50, 20, 2, 2e9)]}
    slow = {"cases": [case(1000, 800, 1, 8e9), case(500, 200, 2, 2e9)]}
    check = scripts[2]
    assert check.ratios(fast) == check.ratios(slow)
    assert check.ratios(fast)["gna"]["attention_speedup"] == 4
    assert check.ratios(fast)["gna"]["flops"] == 0.25


def test_the_check_answers_with_its_exit_code(
    scripts: tuple[ModuleType, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = scripts[2]
    monkeypatch.setattr(sys, "argv", ["check.py", "--results", str(tmp_path)])
    assert check.main() == 2
    assert "make bench-latency" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{}")
    assert check.main() == 2


def test_the_committed_reference_holds_ratios_alone() -> None:
    reference = json.loads((BENCH / "reference.json").read_text())
    assert reference
    for cases in reference.values():
        for ratios in cases.values():
            assert {"density", "flops"} <= set(ratios)
            assert set(ratios) <= {"speedup", "attention_speedup", "density", "flops"}
            assert all(value > 0 for value in ratios.values())
