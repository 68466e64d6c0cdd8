"""Compare measured ratios with the committed reference and say what moved; never absolute times.

python bench/check.py            exit code 1 when a speed-up fell or the work grew
python bench/check.py --update   make the present ratios the reference
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dittools.errors import DitToolsError, InputError
from dittools.metrics.results import load_results, write_atomic

HERE = Path(__file__).parent
REFERENCE = HERE / "reference.json"
# relative change that counts as moved: times are noisy, densities and FLOPs are exact
TOLERANCE = {"speedup": 0.2, "attention_speedup": 0.2, "density": 1e-3, "flops": 1e-3}
HIGHER_IS_BETTER = ("speedup", "attention_speedup")


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the ratios of each accelerated case to the dense one of the same file."""
    dense = results["cases"][0]
    found = {}
    for case in results["cases"][1:]:
        spent = case["parts_ms"]["attention"]["median"] + case["parts_ms"]["choosing"]["median"]
        found[case["name"]] = {
            "speedup": case["speedup"]["median"],
            "attention_speedup": dense["parts_ms"]["attention"]["median"] / spent,
            "density": case["density"],
            "flops": case["flops"] / dense["flops"],
        }
    return found


def moved(
    reference: dict[str, Any], present: dict[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Return sentences: what got worse, what got better, what cannot be compared.

    Args:
        reference: model -> case -> ratio name -> value.
        present: the same.
    """
    worse, better, absent = [], [], []
    for model, cases in reference.items():
        for case, wanted in cases.items():
            got = present.get(model, {}).get(case)
            if got is None:
                absent.append(f"{model}, {case}: not measured")
                continue
            for name, before in wanted.items():
                change = got[name] / before - 1
                if abs(change) <= TOLERANCE[name]:
                    continue
                text = f"{model}, {case}: {name} {before:.3f} -> {got[name]:.3f} ({change:+.0%})"
                (better if (change > 0) == (name in HIGHER_IS_BETTER) else worse).append(text)
    absent += [f"{model}: not in the reference" for model in present if model not in reference]
    return worse, better, absent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--update", action="store_true", help="write the reference")
    options = parser.parse_args()
    try:
        documents = [load_results(path) for path in sorted(options.results.glob("*.json"))]
        if not documents:
            raise InputError(f"no results in {options.results}", remedy="make bench-latency")
    except DitToolsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    present = {document["run"]["model"]: ratios(document) for document in documents}
    if options.update:
        write_atomic(options.reference, json.dumps(present, indent=1) + "\n")
        print(f"reference: {options.reference}")
        return 0
    worse, better, absent = moved(
        json.loads(options.reference.read_text(encoding="utf-8")), present
    )
    for title, lines in (("worse", worse), ("better", better), ("not compared", absent)):
        for line in lines:
            print(f"{title}: {line}")
    if not worse and not better:
        print("no ratio moved")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
