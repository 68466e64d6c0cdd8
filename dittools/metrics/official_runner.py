"""Runs the official VBench package; executed by another interpreter, never imported by dittools.

Usage: python -I official_runner.py CLIPS_FOLDER OUTPUT_FOLDER DEVICE DIMENSION [DIMENSION ...]
Writes OUTPUT_FOLDER/bridge.json: dimension -> {"value", "clips"} or {"error"}.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def let_torchvision_load() -> object:
    """Declare the operators torchvision's compiled part would, where that part cannot be loaded.

    VBench imports torchvision for resizing alone, which is plain Python.
    """
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return library
    return None


def main(clips: str, output: str, device: str, *dimensions: str) -> None:
    """Measure each dimension on its own, so that one without its network leaves the rest."""
    kept = let_torchvision_load()
    VBench = import_module("vbench").VBench  # noqa: N806 -- a class

    found: dict[str, Any] = {}
    for dimension in dimensions:
        try:
            bench = VBench(torch.device(device), "", output)
            bench.evaluate(
                videos_path=clips,
                name=dimension,
                dimension_list=[dimension],
                mode="custom_input",
            )
            written = json.loads((Path(output) / f"{dimension}_eval_results.json").read_text())
            value, each = written[dimension]
            rows = {Path(row["video_path"]).name: row["video_results"] for row in each}
            found[dimension] = {"value": value, "clips": rows}
        except Exception as error:  # noqa: BLE001 -- whatever VBench raises becomes the answer
            found[dimension] = {"error": f"{type(error).__name__}: {error}"}
    (Path(output) / "bridge.json").write_text(json.dumps(found))
    del kept  # the declared operators live as long as it does


if __name__ == "__main__":
    main(*sys.argv[1:])
