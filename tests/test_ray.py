"""A batch on a local Ray cluster of two actors, one of them killed on the way."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dittools.errors import InputError
from dittools.pipelines.batch_run import plan_batch, run_batch
from dittools.pipelines.ray_engine import run_on_ray
from dittools.pipelines.session import Request

pytestmark = pytest.mark.ray


def request_in(folder: Path) -> tuple[Request, Path]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"scene number {n}" for n in range(20)))
    out = folder / "out"
    return Request(model="tiny/wan", method="gna", steps=2, frames=5, out=out), prompts


def test_an_actor_that_dies_is_replaced_and_no_clip_is_lost(tmp_path: Path) -> None:
    request, prompts = request_in(tmp_path)
    seen: list[int] = []
    killed: list[int] = []

    def tell(_what: str, done: int, _total: int) -> None:
        seen.append(done)

    def kill_one() -> None:
        until = time.monotonic() + 300
        while not list(request.out.glob("*.clip.json")) and time.monotonic() < until:
            time.sleep(0.02)
        actors = [p for p in psutil.process_iter(["name", "cmdline"]) if _is_actor(p)]
        if actors:
            actors[0].kill()
            killed.append(actors[0].pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = run_batch(request, prompts, tell, engine="ray", workers=2)
    killer.join()
    assert killed
    assert (report["done"], report["missing"], report["failures"]) == (20, [], [])
    assert len(list(request.out.glob("*.mp4"))) == 20
    assert seen == list(range(21))

    stamps = {p: p.stat().st_mtime_ns for p in request.out.glob("*.mp4")}
    (request.out / "scene number 3-0.mp4").unlink()
    again = run_batch(request, prompts, tell, engine="ray", workers=1)
    assert again["done"] == 20
    changed = {p.name for p, t in stamps.items() if p.stat().st_mtime_ns != t}
    assert changed == {"scene number 3-0.mp4"}
    assert json.loads((request.out / "report.json").read_text()) == again


def _is_actor(process: Any) -> bool:
    words = " ".join(process.info["cmdline"] or ())
    return words.startswith("ray::MapWorker") or "ray::_MapWorker" in words


def test_a_number_of_workers_below_one_is_refused(tmp_path: Path) -> None:
    request, prompts = request_in(tmp_path)
    with pytest.raises(InputError, match="workers is not usable"):
        run_on_ray(plan_batch(request, prompts, 1), 0, lambda *_: None)
