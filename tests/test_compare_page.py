"""The comparison page stands alone, warns where it must, and shows where clips differ; votes."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dittools import cli
from dittools.commands.compare_page import compare_page, heat_map, parts_plot, scatter
from dittools.errors import InputError
from dittools.metrics import vote
from dittools.metrics.fidelity import compare
from dittools.metrics.results import new_results
from dittools.pipelines.output import write_clip


def spread(value: float) -> dict[str, float | int]:
    return {"p20": value * 0.9, "median": value, "p80": value * 1.1, "repeats": 3}


def case(name: str, ms: float, speed: float, fidelity: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": name,
        "plan_checksum": "0123456789abcdef",
        "density": 0.4,
        "total_ms": spread(ms),
        "parts_ms": {"attention": spread(ms / 2), "vae": spread(ms / 2)},
        "peak_bytes": 2**20,
        "speedup": spread(speed),
        "limit_ms": 1.0,
        "bound": 2.0,
        "bound_at_density": 1.4,
        "fidelity": fidelity,
        "prompt_score": None,
        "clip": f"clips/{name}.mp4",
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results whose accelerated clip differs in one corner of frames 10 to 13."""
    rng = np.random.default_rng(0)
    dense = np.repeat(rng.random((1, 48, 64, 3)), 20, 0).astype(np.float32)
    fast = dense.copy()
    fast[10:14, :12, :16] = 1 - fast[10:14, :12, :16]
    folder = tmp_path / "first"
    write_clip(folder / "clips" / "dense.mp4", dense, 4)
    write_clip(folder / "clips" / "gna <b>.mp4", fast, 4)
    found = compare(dense, fast).to_dict()
    run = {"model": "tiny/wan", "prompt": "<script>alert(1)</script>", "seed": 0, "steps": 4}
    cases = [case("dense", 100, 1, None), case("gna <b>", 60, 1.7, found)]
    floors = {"another seed": {**found, "psnr_db": 11.0}}
    path = folder / "results.json"
    path.write_text(json.dumps(new_results(run, cases, floors=floors)))
    return path


def load(path: Path) -> tuple[Path, dict[str, Any]]:
    document = json.loads(path.read_text())
    document["git"]["dirty"] = False
    return path, document


class Tags(HTMLParser):
    """Counts tags, checks that they nest, and gathers every address."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.sources: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "input", "line", "circle", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, tag


def test_the_page_stands_alone_and_escapes_every_text(results: Path) -> None:
    html = compare_page([load(results)])
    tags = Tags(html)
    assert tags.open == []
    assert tags.count["video"] == 2
    assert tags.count["input"] == 1
    assert tags.count["script"] == 1
    assert tags.sources
    assert all(source.startswith("data:") for source in tags.sources)
    assert "<b>" not in re.sub(r"<b>[^<]* are not comparable</b>", "", html)
    assert "&lt;script&gt;alert(1)" in html
    assert "$" not in re.sub(r"base64,[^\"]*", "", html)


def test_the_worst_second_and_the_place_are_found(results: Path) -> None:
    html = compare_page([load(results)])
    assert "Worst second: frames 10 to 13" in html
    dense = np.zeros((4, 20, 30, 3), np.uint8)
    other = dense.copy()
    other[2, 5:9, 10:20] = 80
    picture, top = heat_map(dense, other)
    assert top == pytest.approx(20)
    assert (picture[5:9, 10:20] == 255).all()
    assert picture[:5].max() == 0
    blank, none = heat_map(dense, dense)
    assert none == 0
    assert blank.max() == 0


def test_files_that_are_not_comparable_are_warned_about(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(results)
    other = copy.deepcopy(first[1])
    assert "not comparable" not in compare_page([first, (tmp_path / "b.json", other)])
    other["run"]["seed"] = 9
    other["versions"]["torch"] = "0.1"
    html = compare_page([first, (tmp_path / "b.json", other)])
    assert "are not comparable" in html
    assert "other seed: 0 and 9" in html
    assert "The dense clip is not beside the file." in html
    second = tmp_path / "b.json"
    second.write_text(json.dumps(other))
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "compare", str(results), str(second), "--out", str(page), "--json"])
    assert not stop.value.code
    said = json.loads(capsys.readouterr().out)
    assert any("other seed" in reason for reason in said["not_comparable"][str(second)])
    assert "are not comparable" in page.read_text()


def test_damaged_input_writes_no_page(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    write_clip(results.parent / "clips" / "gna <b>.mp4", np.zeros((20, 40, 64, 3), np.float32), 4)
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for words, message in (
        ([str(results)], "differ in length or size"),
        ([str(bad)], "holds no results"),
        ([str(tmp_path / "none.json")], "cannot read results"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "compare", *words, "--out", str(page)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not page.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "nonsense"], "nonsense"),
        (["--method", "dense"], "no case to measure"),
        (["--method", "gna", "--repeats", "0"], "repeats"),
        (["--plan", "none.json"], "none.json"),
        (["--model", "nope"], "there is no model 'nope'"),
        (["--model", "./nope"], "there is no model './nope'"),
        (["--model", "tiny/nope"], "there is no model 'tiny/nope'"),
        (["--model", "owner/name"], "no prompt"),
        (["--model", "tests"], "no prompt"),
    ],
)
def test_bad_benches_fail_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "latency", "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bars_are_as_long_as_the_times() -> None:
    svg = parts_plot([case("dense", 100, 1, None), case("gna", 50, 2, None)])
    bars = [float(w) for w in re.findall(r'width="([\d.]+)" height="18"', svg)]
    assert len(bars) == 4
    assert bars[0] == pytest.approx(bars[1])
    assert bars[0] == pytest.approx(2 * bars[2], rel=0.01)


# -- blind votes

PAIRS = [(f"pair {i}", f"fast{i}.mp4", f"other{i}.mp4", f"dense{i}.mp4") for i in range(20)]


@pytest.mark.parametrize("speed", [0.9, 12.0, 1e6, 1e300])
def test_any_speed_has_a_place_on_the_plot_and_few_ticks(speed: float) -> None:
    fidelity = {"psnr_db": 30.0}
    drawn = scatter([(Path("r.json"), {"cases": [case("fast", 10, speed, fidelity)]})])
    assert 1 <= len(re.findall(r">\d+x<", drawn)) <= 12
    (place,) = re.findall(r'<circle cx="([\d.]+)"', drawn)
    assert 48 <= float(place) <= 640 - 90 + 48


def test_trials_are_shuffled_balanced_and_repeatable() -> None:
    first, again, other = vote.trials(PAIRS, 3), vote.trials(PAIRS, 3), vote.trials(PAIRS, 4)
    assert first == again != other
    assert [t.pair for t in first] != [p[0] for p in PAIRS]
    assert sorted(t.pair for t in first) == sorted(p[0] for p in PAIRS)
    assert sum(t.first_is_a for t in first) == 10
    for trial in first:
        shown = trial.a if trial.first_is_a else trial.b
        assert shown.startswith("fast")
        assert trial.x.startswith("dense")
    with pytest.raises(InputError):
        vote.trials([PAIRS[0], PAIRS[0]], 0)


def test_votes_survive_and_are_counted_for_the_clip_behind_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    trials = vote.trials(PAIRS, 0)
    for number, trial in enumerate(trials[:12]):
        box = vote.VoteBox(path)  # as if the page were opened anew for each vote
        assert box.open_trials(trials) == trials[number:]
        wanted = number < 9
        box.cast(trial, "a" if trial.first_is_a == wanted else "b")
    box.cast(trials[12], "same")
    found = vote.VoteBox(path).tally()
    assert (found.first, found.second, found.same) == (9, 3, 1)
    assert found.share == 0.75
    assert "could be chance" in str(found)
    box.cast(trials[12], "a")
    assert box.tally().same == 0
    with pytest.raises(InputError, match="no such choice"):
        box.cast(trials[0], "c")


def test_no_vote_says_nothing(tmp_path: Path) -> None:
    found = vote.VoteBox(tmp_path / "votes.json").tally()
    assert found.share is None
    assert (found.low, found.high) == (0, 1)
    assert "no decided vote" in str(found)
    assert not (tmp_path / "votes.json").exists()


@pytest.mark.parametrize(("successes", "total"), [(0, 5), (3, 10), (9, 12), (50, 100), (7, 7)])
def test_wilson_interval_inverts_the_score_test(successes: int, total: int) -> None:
    """Its ends p solve |share - p| = z * sqrt(p (1 - p) / n)."""
    low, high = vote.wilson(successes, total)
    share = successes / total
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            error = abs(share - end) / np.sqrt(end * (1 - end) / total)
            assert error == pytest.approx(1.959964, abs=1e-5)
    assert vote.wilson(successes, total, 0.99)[1] >= high


def test_unusable_vote_files_are_kept_and_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    for text in ("{", "[]", '{"format": "other", "version": 1, "votes": {}}'):
        path.write_text(text)
        with pytest.raises(InputError, match="votes"):
            vote.VoteBox(path)
        assert path.read_text() == text
    with pytest.raises(InputError):
        vote.wilson(3, 2)
