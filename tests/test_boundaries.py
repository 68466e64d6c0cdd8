"""Which module may import which, and what a bare import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dittools"
CORE = {"errors", "grid", "order", "mask", "tiling", "call", "flex_mask", "reading", "system"}
BELOW_ALL = {"errors", "reading", "system"}  # know nothing of attention
LAYERS = [
    *("core", "kernels", "methods", "plans", "patches", "pipelines", "searching"),
    *("serving", "top", "studio", "entry"),
]
# modules outside the layer folders; functional and doctor sit above what they call
TOP = {"__init__", "contract", "doctor", "functional", "commands"}
ENTRY = {"__main__", "cli"}  # may import everything
HEAVY = {
    "diffusers": {"patches", "pipelines"},
    "transformers": {"patches", "pipelines", "metrics"},
    "gradio": {"studio"},
    "plotly": {"studio"},
    "torchvision": set(),
    "triton": {"kernels"},
}


def _layer(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if first in CORE:
        return "core"
    if first in ENTRY:
        return "entry"
    return "top" if first in TOP else first


def _imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, type checking blocks left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    layer = _layer(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "dittools" and len(parts) > 1 and (PACKAGE / parts[1]).exists():
            target = parts[1]
        elif parts[0] == "dittools" and len(parts) > 1 and (PACKAGE / f"{parts[1]}.py").exists():
            target = "core" if parts[1] in CORE else "entry" if parts[1] in ENTRY else "top"
        else:
            top = parts[0]
            assert top not in HEAVY or layer in HEAVY[top] or layer == "top", (path, name)
            continue
        if layer == "metrics":
            assert target == "metrics" or parts[1] in BELOW_ALL, f"metrics imports {name}"
        elif target == "metrics":
            assert layer in ("pipelines", "searching", "top", "studio"), f"{layer} imports {name}"
        else:
            assert LAYERS.index(target if target in LAYERS else "top") <= LAYERS.index(layer), (
                f"{path.name} ({layer}) imports {name}"
            )


def test_layers_cover_every_folder() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= {*LAYERS, "metrics", "commands"}


def test_cold_import_needs_torch_alone() -> None:
    """The public names load without the heavy packages; blocked ones raise if touched."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "gradio", "torchvision", "diffusers", "transformers",
                                  "imageio", "typer", "rich", "torchmetrics"}:
            raise ImportError("blocked " + name)
import torch
sys.meta_path.insert(0, Block())
import dittools
grid = dittools.TokenGrid(3, 4, 4)
q, k, v = torch.randn(3, 1, grid.total, 2, 16).unbind()
out = dittools.attention(q, k, v, grid=grid, method=dittools.METHODS["gna"]())
assert out.shape == q.shape
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_alone_is_quick_and_light() -> None:
    code = """
import time, torch
start = time.perf_counter()
import dittools
print(time.perf_counter() - start)
import sys
assert not {"diffusers", "transformers", "triton", "rich"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


def test_nothing_at_the_root_shadows_a_dependency() -> None:
    root = PACKAGE.parent
    taken = {"kernels", "methods", "metrics", "torch", "diffusers", "triton", "gradio"}
    assert not [p for p in root.iterdir() if p.stem in taken]
