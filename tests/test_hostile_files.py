"""Files other than plans that must not crash a loader or lead it elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dittools.errors import DitToolsError, InputError, PlanError, UnsupportedCall
from dittools.kernels.triton_config import load_tuning
from dittools.metrics.clips import read_clip
from dittools.metrics.results import load_results, new_results
from dittools.metrics.vote import VoteBox
from dittools.pipelines import batch
from dittools.searching.cost import load_costs
from dittools.searching.store import Store, read_prompts
from dittools.studio.atlas_edit import read_atlas
from dittools.studio.live_search import read_frontier
from dittools.studio.runs import RunStore

READERS: dict[str, Any] = {
    "results": load_results,
    "votes": VoteBox,
    "costs": load_costs,
    "prompts": read_prompts,
    "suite": batch.read_prompts,
    "atlas": read_atlas,
    "frontier": read_frontier,
    "tuning": load_tuning,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["device", "folder", "deep", "large", "loop"])
def test_what_is_no_file_of_its_kind_is_refused_at_once(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / "file.json"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path.write_text("[" * 100_000)
    else:
        with path.open("wb") as file:
            file.truncate(200_000_000)
    if (name, kind) == ("votes", "loop"):
        assert VoteBox(path).tally().share is None  # nothing is there
    elif (name, kind) == ("prompts", "deep"):
        assert len(read_prompts(path)) == 1  # a prompt is text
    else:
        with pytest.raises((InputError, PlanError, UnsupportedCall)) as caught:
            READERS[name](path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXT-X-VERSION:3\n", "ffconcat version 1.0\n", ""])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".png", ".jpg"])
def test_a_clip_that_is_a_list_of_other_files_is_not_decoded(
    tmp_path: Path, text: str, suffix: str
) -> None:
    (tmp_path / f"clip{suffix}").write_text(f"{text}file '/etc/passwd'\n")
    with pytest.raises(InputError, match="what its name says"):
        read_clip(tmp_path / f"clip{suffix}")


def case(clip: str) -> dict[str, Any]:
    spread = {"median": 1.0, "p20": 1.0, "p80": 1.0}
    return {
        "name": "dense",
        "plan_checksum": "",
        "density": 1.0,
        "total_ms": spread,
        "parts_ms": {"all": spread},
        "peak_bytes": None,
        "speedup": spread,
        "limit_ms": None,
        "bound": 1.0,
        "bound_at_density": 1.0,
        "fidelity": None,
        "prompt_score": None,
        "clip": clip,
    }


@pytest.mark.parametrize("clip", ["../secret.mp4", "/etc/passwd", "out/secret.mp4", "C:\\x"])
def test_results_cannot_name_clips_elsewhere(tmp_path: Path, clip: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (folder / "out").symlink_to(tmp_path)
    path = folder / "results.json"
    path.write_text(json.dumps(new_results({"model": "demo"}, [case("clips/dense.mp4")])))
    assert load_results(path)["cases"][0]["clip"] == "clips/dense.mp4"
    path.write_text(json.dumps(new_results({"model": "demo"}, [case(clip)])))
    with pytest.raises(InputError, match="names a clip elsewhere"):
        load_results(path)


@pytest.mark.parametrize("change", [{"bound": "1"}, {"parts_ms": []}, {"fidelity": {}}])
def test_results_of_another_shape_name_the_place(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(new_results({"model": "demo"}, [{**case("a.mp4"), **change}])))
    with pytest.raises(InputError, match=r"cases\[0\]\." + next(iter(change))):
        load_results(path)


def test_a_unit_that_changed_on_disk_is_done_again(tmp_path: Path) -> None:
    Store(tmp_path).once("unit", lambda: {"a": torch.arange(4)})
    (path,) = tmp_path.iterdir()
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(bytes(blob))
    again = Store(tmp_path).once("unit", lambda: {"a": torch.arange(5)})
    assert again["a"].tolist() == [0, 1, 2, 3, 4]
    assert Store(tmp_path).once("unit", dict)["a"].tolist() == [0, 1, 2, 3, 4]


def test_files_of_a_run_stay_in_its_folder(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    folder = store.begin()
    (folder / "clip.mp4").write_bytes(b"clip")
    run = store.finish(folder, "generate", "x", {}, {"clip": folder / "clip.mp4"})
    assert store.verify(run) == []
    (tmp_path / "other").write_bytes(b"clip")
    (folder / "clip.mp4").unlink()
    (folder / "clip.mp4").symlink_to(tmp_path / "other")
    assert store.verify(run) == ["clip.mp4 is missing"]
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"clip.mp4"', '"../clip.mp4"', 1))
    with pytest.raises(DitToolsError, match="cannot be read"):
        store.open(run.id)
