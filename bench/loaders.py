"""Every loader of files from elsewhere, with valid files to start from and what is done with them.

Used by the fuzzers: `LOADERS[name].files()` gives the valid files, `load(folder)` reads them as
dittools does and goes on to what is done with the result. Loaders that only read what the same
process has written, and folders handed to diffusers, are not in the table.
"""

import json
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_plans
import numpy as np
import torch
from hostile import Files
from safetensors.torch import save

from dittools.commands.compare_page import compare_page
from dittools.commands.suite import known_prompts
from dittools.commands.terminal import pairs
from dittools.errors import DitToolsError
from dittools.grid import TokenGrid
from dittools.kernels.triton_config import _TUNED, load_tuning
from dittools.methods.paro_tables import load_tables
from dittools.metrics.clips import read_clip
from dittools.metrics.embedders import _model_type, _state
from dittools.metrics.results import load_results, new_results, reasons_not_comparable
from dittools.metrics.vote import VoteBox, trials
from dittools.pipelines import batch
from dittools.pipelines.highres import _loaded
from dittools.pipelines.output import write_clip
from dittools.searching.cost import flops_table, load_costs
from dittools.searching.forecast import _load_config, load_of_config
from dittools.searching.store import Store, read_prompts
from dittools.studio.atlas_edit import AtlasEdit, plan_of, read_atlas
from dittools.studio.atlas_view import grid as atlas_grid
from dittools.studio.ballots import entries
from dittools.studio.comparison import can_compare, report_of
from dittools.studio.live_search import read_frontier
from dittools.studio.params import from_text
from dittools.studio.plots import frontier_figure
from dittools.studio.runs import RunStore
from dittools.studio.uploads import read_plan

RUN = "20260102-030405-0123abcd"


class Loader(NamedTuple):
    """Valid files by name, and what reads them."""

    files: Callable[[], Files]
    load: Callable[[Path], Any]


def _made(make: Callable[[Path], Any]) -> Files:
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}


def _text(content: Any) -> bytes:
    return json.dumps(content).encode()


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "p20": value, "p80": value}


def _case(name: str) -> dict[str, Any]:
    quality = {"psnr_db": 30.0, "ssim": 0.9, "ms_ssim": None, "frame_psnr_db": [29.0, 31.0]}
    return {
        "name": name,
        "method": name,
        "plan_checksum": "0123456789abcdef",
        "density": 0.5,
        "total_ms": _spread(10.0),
        "parts_ms": {"attention": _spread(5.0), "other": _spread(5.0)},
        "peak_bytes": None,
        "speedup": _spread(1.5),
        "limit_ms": 1.0,
        "bound": 2.0,
        "bound_at_density": 1.5,
        "fidelity": None if name == "dense" else quality,
        "prompt_score": {"all": True},
        "clip": f"clips/{name}.mp4",
    }


@lru_cache(maxsize=1)
def _results() -> bytes:
    run = {"model": "demo", "prompt": "a red circle", "seed": 0, "steps": 4, "warm_up": 1}
    floor = {"seed": 1, "psnr_db": 12.0, "ssim": 0.3, "ms_ssim": None, "frame_psnr_db": [12.0]}
    document = new_results(run, [_case("dense"), _case("gna")], floors={"another seed": floor})
    return _text(document)


def _compare(folder: Path) -> str:
    document = load_results(folder / "results.json")
    reasons_not_comparable(document, document)
    return compare_page([(folder / "results.json", document)])


def _vote(folder: Path) -> VoteBox:
    box = VoteBox(folder / "votes.json")
    every = trials([("one", "a.mp4", "b.mp4", "x.mp4"), ("two", "a.mp4", "b.mp4", "")], 0)
    for trial in box.open_trials(every):
        box.cast(trial, "a")
    str(box.tally())
    return box


def _report() -> dict[str, Any]:
    side = {"attention_seconds": 0.1, "all_seconds": [0.2, 0.3]}
    return {
        "model": "demo",
        "method": "gna",
        "created": "2026-01-02T03:04:05+00:00",
        "settings": {"prompt": "a red circle", "seed": 0, "steps": 4},
        "environment": {"machine": "x", "gpu": "", "threads": 1},
        "density": 0.5,
        "attention_share": 0.4,
        "speedup_bound": 1.5,
        "prompt_score": None,
        "fidelity": _case("gna")["fidelity"],
        "floors": {},
        "dense": side,
        "accelerated": side,
    }


@lru_cache(maxsize=1)
def _run_files() -> Files:
    def make(folder: Path) -> None:
        store = RunStore(folder / "runs")
        run = store.begin()
        (run / "report.json").write_bytes(_text(_report()))
        (clip,) = _clip_files("clip.mp4", 4).values()
        for name in ("dense", "accelerated"):
            (run / f"{name}.mp4").write_bytes(clip)
        files = {"report": run / "report.json"}
        files |= {name: run / f"{name}.mp4" for name in ("dense", "accelerated")}
        store.finish(run, "generate", "a red circle", {"model": "demo"}, files)
        for path in run.iterdir():
            path.rename(folder / path.name)

    return _made(make)


def _run(folder: Path) -> Any:
    """Files of a run lie one folder deeper, under the run's name."""
    store = RunStore(folder / "runs")
    home = folder / "runs" / RUN
    home.mkdir(exist_ok=True)
    for path in [p for p in folder.iterdir() if p.name != "runs"]:
        path.rename(home / path.name)
    try:
        run = store.open(RUN)
        store.verify(run)
        entries(store.entries())
        return report_of([run]) if can_compare(run) else None
    finally:
        for path in home.iterdir():
            path.rename(folder / path.name)
        home.rmdir()
        store.root.rmdir()


def _atlas_files() -> Files:
    cells = [
        {
            "layer": layer,
            "range": part,
            "head": head,
            "class": "local",
            "bands": [0.5, 0.5],
            "choice": head,
            "error": [0.0, None if layer else 0.1],
            "branches": [],
            "map": [0, 255, 3, 4],
        }
        for layer in range(2)
        for part in range(2)
        for head in range(2)
    ]
    cells[1]["choices"] = [1, 0]
    known = [
        {"name": "dense", "method": "dense", "params": {}, "density": 1.0},
        {"name": "gna", "method": "gna", "params": {"window": [3, 3, 3]}, "density": 0.4},
    ]
    model = {"class": "WanTransformer3DModel", "layers": 2, "heads": 2, "head_dim": 16}
    found = {
        "layers": 2,
        "heads": 2,
        "ranges": [0, 0.5, 1],
        "range_steps": [1, 2],
        "bands": ["a", "b"],
        "uniform": [0.1, 0.9],
        "candidates": known,
        "cells": cells,
        "model": model,
    }
    return {"atlas.json": _text(found)}


def _atlas(folder: Path) -> Any:
    edit = AtlasEdit.start(read_atlas(folder / "atlas.json"))
    edit.density()
    atlas_grid(edit, 0, (0, 0))
    return plan_of(edit.with_choice([0], 0))


def _frontier_files() -> Files:
    point = {"density": 0.5, "psnr_db": 30.0}
    single = {**point, "method": "gna", "name": "gna", "predicted_db": 29.0, "held_out": None}
    found = {"predicted": [point], "singles": [single], "trials": [point], "chosen": point}
    return {"frontier.json": _text(found)}


def _unit(folder: Path) -> Any:
    made = Store(folder).once("unit", lambda: {"a": torch.arange(4)})
    return made["a"].sum()


def _records(folder: Path) -> batch.Batch:
    wanted = batch.jobs(["a red circle"], 1, 0, folder)
    return batch.Batch(wanted, folder, "mark", 8)


def _record_files() -> Files:
    def make(folder: Path) -> None:
        found = _records(folder)
        (folder / "a red circle-0.mp4").write_bytes(b"clip")
        record = {
            "format": batch.FORMAT,
            "version": batch.VERSION,
            "file": "a red circle-0.mp4",
            "sha256": batch._digest(found.jobs[0].path),
            "mark": "mark",
            "seed": 0,
            "prompt": "a red circle",
            "frames": 1,
            "seconds": 0.5,
        }
        found.jobs[0].record.write_bytes(_text(record))
        batch.note_failures(found, 0, 1, [{"prompt": "x"}])

    return _made(make)


def _record(folder: Path) -> Any:
    found = _records(folder)
    batch.is_done(found.jobs[0], "mark")
    return batch.merge(found, 1)


def _tune(folder: Path) -> int:
    try:
        return load_tuning(folder / "tuning.json")
    finally:
        _TUNED.clear()


def _clip_files(name: str, frames: int) -> Files:
    pixels = np.random.default_rng(0).random((frames, 16, 16, 3), np.float32)
    return _made(lambda folder: write_clip(folder / name, pixels, 8))


def _options(folder: Path) -> Any:
    path = folder / "options.txt"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    return from_text(text), pairs([f"x={text}"])


def _weights(folder: Path) -> Any:
    _model_type(folder, "clip")
    _state(folder / "weights.safetensors", "weights")
    return _loaded(folder / "weights.safetensors")


PLAN = {name: blob for files in fuzz_plans.seeds()[-5:-4] for name, blob in files.items()}
CONFIG = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "num_layers": 30,
    "patch_size": [1, 2, 2],
    "ffn_dim": 8960,
    "text_dim": 4096,
}
WEIGHTS = save({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}, {"by": "test"})
LOADERS: dict[str, Loader] = {
    "plan": Loader(lambda: PLAN, lambda f: fuzz_plans.use(f, runs=False)),
    "upload": Loader(lambda: PLAN, lambda f: read_plan(sorted(f.iterdir()))),
    "tables": Loader(
        lambda: _made(lambda f: fuzz_plans.tables().save(f / "t.safetensors")),
        lambda f: load_tables(f / "t.safetensors").mask(1, 1),
    ),
    "prompts": Loader(
        lambda: {"prompts.txt": "a red circle\n\n a blue squäre \n".encode()},
        lambda f: (read_prompts(f / "prompts.txt"), batch.read_prompts(f / "prompts.txt")),
    ),
    "suite": Loader(
        lambda: {"prompts.json": _text(["a red circle", {"prompt_en": "a blue square"}])},
        lambda f: batch.jobs(batch.read_prompts(f / "prompts.json"), 2, 0, f),
    ),
    "index": Loader(
        lambda: {"prompts.json": _text({"a-0.mp4": "a red circle"}), "report.json": b"{}"},
        known_prompts,
    ),
    "results": Loader(lambda: {"results.json": _results()}, _compare),
    "votes": Loader(lambda: _made(_vote), _vote),
    "run": Loader(_run_files, _run),
    "atlas": Loader(_atlas_files, _atlas),
    "frontier": Loader(
        _frontier_files, lambda f: frontier_figure(read_frontier(f / "frontier.json"))
    ),
    "unit": Loader(lambda: _made(_unit), _unit),
    "record": Loader(_record_files, _record),
    "tuning": Loader(
        lambda: {"tuning.json": _text({"128/128x64/bfloat16": [64, 32, 4, 3, 0]})}, _tune
    ),
    "costs": Loader(
        lambda: {"costs.json": _text(flops_table(TokenGrid(1, 4, 4), 2, 16).to_dict())},
        lambda f: load_costs(f / "costs.json"),
    ),
    "config": Loader(
        lambda: {"config.json": _text(CONFIG)},
        lambda f: load_of_config(_load_config(f / "config.json"), 480, 832, 81, 50, (4, 8, 8)),
    ),
    "weights": Loader(
        lambda: {"weights.safetensors": WEIGHTS, "config.json": _text({"model_type": "clip"})},
        _weights,
    ),
    "image": Loader(lambda: _clip_files("clip.png", 1), lambda f: read_clip(f / "clip.png").pixels),
    "video": Loader(lambda: _clip_files("clip.mp4", 4), lambda f: read_clip(f / "clip.mp4").pixels),
    "options": Loader(lambda: {"options.txt": b"[1, 0.5, full]"}, _options),
}

__all__ = ["LOADERS", "DitToolsError", "Loader"]
