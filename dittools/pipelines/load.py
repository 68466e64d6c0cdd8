"""A pipeline from a short name, a local folder or a hub id."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dittools.errors import InputError


def names() -> list[str]:
    """Return the short names `load` knows without a download."""
    from dittools.pipelines.tiny import TINY

    return ["demo", *(f"tiny/{name}" for name in TINY)]


def check_name(name: str) -> None:
    """Raise when a name can be no model, as far as that shows without loading anything.

    Raises:
        InputError: no such short name or folder, and no hub id, which is owner/name.
    """
    known = names()
    if name in known or Path(name).expanduser().exists():
        return
    owner, slash, rest = name.partition("/")
    if name.startswith((".", "/", "~", "tiny/")) or not (owner and slash and rest):
        raise InputError(
            f"there is no model {name!r}",
            expected=f"{', '.join(known[:2])}, ..., a diffusers folder, or a hub id",
        )


def load(name: str, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """Return a stock diffusers pipeline, ready to call.

    Args:
        name: "demo" (the embedded model), "tiny/<family>" (random weights, for trying things out),
            a local diffusers folder, or a hub id. Folders and hub ids load safetensors only, and
            no code that comes with them is run.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: where to put it.
    Raises:
        InputError: no such name, folder or dtype.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in dtypes:
        raise InputError("unknown dtype", expected=f"auto, {', '.join(dtypes)}", got=repr(dtype))
    _check_device(device)
    if name == "demo":
        from dittools.pipelines.demo import load_demo

        with _no_loading_bars():
            pipe = load_demo()
    elif name.startswith("tiny/"):
        pipe = _tiny(name.removeprefix("tiny/"))
    else:
        pipe = _pretrained(name, dtypes.get(dtype))
    if dtype != "auto":
        pipe = pipe.to(dtypes[dtype])
    return pipe.to(device)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0][:160]
        raise InputError(
            "device is not usable", expected="cpu, or a GPU that is there", got=f"{device}: {said}"
        ) from error


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Switch the libraries' loading bars off: the embedded model loads in a blink."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    switches = (diffusers_logging, transformers_logging)
    shown = [switch.is_progress_bar_enabled() for switch in switches]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch, was_shown in zip(switches, shown, strict=True):
            if was_shown:
                switch.enable_progress_bar()


def _tiny(name: str) -> Any:
    from dittools.pipelines.tiny import TINY, build

    if name not in TINY:
        raise InputError(
            "unknown tiny pipeline", expected=f"one of {', '.join(TINY)}", got=repr(name)
        )
    return build(name)


def _pretrained(name: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    looks_local = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    source = str(Path(name).expanduser()) if looks_local else name
    # the argument was renamed in 0.42, and the old name warns since
    old = tuple(int(part) for part in version("diffusers").split(".")[:2]) < (0, 42)
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype" if old else "dtype": dtype}
    try:
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot load a pipeline from {name!r}",
            expected=f"{', '.join(names()[:2])}, ..., a diffusers folder, or a hub id",
            got=first,
        ) from error
