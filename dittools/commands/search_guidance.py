"""`dittools search --objective guidance`: the heads whose perturbation guides best."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """Options of the guidance search."""

    scorer: str
    rounds: int
    top_k: int
    scale: float
    u: float
    mode: str
    heads: str
    with_atlas: bool


def run(
    wanted: Wanted,
    prompts: Path,
    model: str,
    dtype: str,
    device: str,
    given: dict[str, Any],
    backend: str,
    out: Path,
    work: Path | None,
    as_json: bool,
) -> None:
    """Search, write plan.json, guidance.json and guidance.html, and print what was found."""
    from dittools.commands.terminal import console, progress
    from dittools.metrics.preference import named_scorer
    from dittools.pipelines import load
    from dittools.pipelines.output import check_writable
    from dittools.pipelines.ranks import finish, is_main, own_device
    from dittools.searching.api import default_work
    from dittools.searching.guidance import Hunt, search_guidance, write_guidance
    from dittools.searching.store import read_prompts

    texts = read_prompts(prompts)
    Hunt(wanted.rounds, wanted.top_k, wanted.scale, wanted.u, wanted.mode)  # before loading
    judge = named_scorer(wanted.scorer)
    check_writable(out.parent)
    folder = work if work is not None else default_work(out)
    pipe = load(model, dtype=dtype, device=own_device(device))
    pipe.set_progress_bar_config(disable=True)
    options = {
        k: v for k, v in asdict(wanted).items() if k not in ("scorer", "heads", "with_atlas")
    }
    with progress() as step:
        found = search_guidance(
            pipe,
            texts,
            judge,
            **options,
            heads=tuple(h for h in wanted.heads.split(",") if h.strip()),
            backend=backend,
            work=folder,
            progress=step,
            **given,
        )
        files = write_guidance(
            pipe, found, texts, out, work=folder, with_atlas=wanted.with_atlas, progress=step
        )
    main = is_main()
    finish()
    if not main:
        return
    if as_json:
        content = {
            "heads": list(found.heads),
            "baseline": found.baseline,
            "rounds": found.details["found"],
            "generations": found.generations,
            "files": {name: str(path) for name, path in files.items()},
        }
        sys.stdout.write(json.dumps(content) + "\n")
        return
    last = found.rounds[-1]
    console.print(
        f"heads {', '.join(found.heads)}; score without guidance {found.baseline:.4f}, best of the "
        f"last round {last.scores[last.chosen[0]]:.4f}; {found.generations} generations",
        markup=False,
        highlight=False,
    )
    for name, path in files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
