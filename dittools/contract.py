"""What attaching relies on in diffusers and transformers, read from the code, and whether it holds.

The names are those that `dittools.patches` and `dittools.pipelines` import, so that none can be
forgotten; the rest is tried out on a toy pipeline.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

HOSTS = ("diffusers", "transformers")
LAYERS = ("patches", "pipelines")
TAKEN = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Symbol(NamedTuple):
    """One imported name; optional where the code goes on without it."""

    module: str
    name: str
    where: str
    optional: bool


@lru_cache(maxsize=1)
def relied_on() -> tuple[Symbol, ...]:
    """Return every name that the layers which touch the hosts import from them."""
    root, found = Path(__file__).parent, []
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            if path.name.startswith("tiny"):  # toy models, some of families yet to come: see below
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            caught = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.Try) and any(map(_is_import_error, node.handlers))
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in HOSTS:
                    where = str(path.relative_to(root))
                    for alias in node.names:
                        module, optional = node.module or "", id(node) in caught
                        found.append(Symbol(module, alias.name, where, optional))
    return tuple(found)


def _is_import_error(handler: ast.ExceptHandler) -> bool:
    return handler.type is not None and "ImportError" in ast.unparse(handler.type)


def absent(symbols: tuple[Symbol, ...]) -> Iterator[Symbol]:
    """Yield the names that the installed hosts lack; names they load lazily count as there."""
    for symbol in symbols:
        try:
            module = importlib.import_module(symbol.module)
        except ImportError:
            yield symbol
            continue
        if symbol.name not in dir(module) and not hasattr(module, symbol.name):
            yield symbol


def entry_point() -> str:
    """Return what is wrong with diffusers' attention entry point, "" when it is as expected."""
    from diffusers.models import attention_dispatch

    function = getattr(attention_dispatch, "dispatch_attention_fn", None)
    if function is None:
        return "dispatch_attention_fn is gone"
    names = inspect.signature(function).parameters
    missing = [name for name in TAKEN if name not in names]
    return f"dispatch_attention_fn lacks {', '.join(missing)}" if missing else ""


def known_families() -> tuple[list[str], list[str]]:
    """Return the model families whose denoisers this diffusers has, and those it does not have."""
    import diffusers

    from dittools.patches import families

    there: list[str] = []
    there_not: list[str] = []
    names = set(dir(diffusers))
    for name, family in families().items():
        (there if names & set(family.denoisers) else there_not).append(name)
    return there, there_not


def attached() -> str:
    """Attach to a toy video pipeline and return what went wrong, "" when all is as it should be.

    A dense plan must give the same bits as the stock pipeline, a sparse one must be followed, and
    detaching must leave the stock pipeline.
    """
    from dittools.methods import build
    from dittools.patches import attach
    from dittools.pipelines import load

    pipe = load("tiny/wan")
    pipe.set_progress_bar_config(disable=True)
    stock = _latents(pipe)
    with attach(pipe, "dense", backend="reference"):
        if not torch.equal(_latents(pipe), stock):
            return "a dense plan changes the picture"
    sparse = build("random", {"density": 0.5, "block_size": 8})
    with attach(pipe, sparse, dense_steps=0, backend="reference") as handle:
        _latents(pipe)
        if not handle.report().calls.get("sparse"):
            return "a sparse plan reaches no attention call"
    return "" if torch.equal(_latents(pipe), stock) else "detaching leaves something behind"


def _latents(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    found: torch.Tensor = pipe(
        "a red circle", generator=generator, output_type="latent", **size
    ).frames
    return found
