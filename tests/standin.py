"""A device that is not there: tensors that say they are on CUDA and compute on the CPU.

`with Device() as device:` makes factories, copies and operators work for tensors on "cuda:0" and
"cuda:1" as CUDA would have them: an operator refuses tensors of two devices, with the exceptions
CUDA makes, whole-number products are refused, and everything the host would have to wait for is
counted with the line that asked for it. Nothing is known of speed.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
LIBRARY = str(Path(__file__).parents[1] / "dittools")

# operators after which the host knows something of the device's numbers
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "histc",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_lstsq", "multinomial",
    "_linalg_check_errors",
}  # fmt: skip
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "convolution"}
NARROW = (torch.uint16, torch.uint32, torch.uint64)  # CUDA has next to no operators for them
MOVES = {
    "_to_copy", "copy_", "view", "reshape", "select", "slice", "detach", "alias", "clone",
    "lift_fresh", "empty", "as_strided", "expand", "permute", "transpose", "unsqueeze", "squeeze",
    "_unsafe_view", "empty_strided", "empty_like", "new_empty",
}  # fmt: skip


_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@lru_cache(maxsize=1)
def _register_guard() -> None:
    """Give a build without CUDA a device guard that does nothing; operators ask for one in C++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler for the device guard of the stand-in device")
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        link = [f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10", "-o", str(built)]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), *link]
        subprocess.run(command, check=True, capture_output=True)
        ctypes.CDLL(str(built))


class Mixed(RuntimeError):
    """CUDA would refuse this."""


class Wait(NamedTuple):
    """One time the host waits for the device, or copies to it."""

    kind: str
    where: str  # innermost line of the library


class StandIn(torch.Tensor):
    """A tensor on a device that is not there."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = CUDA) -> "StandIn":
        made: StandIn = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise Mixed(f"{func} outside of `with Device()`")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(self._indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, (bool, int, float)):  # CUDA fills, a build without it would copy
            value = torch.full((), value, dtype=self.dtype, device=self.device)
        super().__setitem__(self._indices(index), value)

    def _indices(self, index: Any) -> Any:
        """Lists of positions are copied to the device."""
        if isinstance(index, list):
            return torch.tensor(index, device=self.device)
        if isinstance(index, tuple):
            return tuple(self._indices(part) for part in index)
        return index


class Device(TorchDispatchMode):
    """Runs operators on stand-in tensors; `waits` holds what the host waited for.

    Args:
        interpreted: leave the Triton launcher as it is, for `standin_triton`.
    """

    def __init__(self, interpreted: bool = False) -> None:
        super().__init__()
        self._interpreted = interpreted
        self.waits: list[Wait] = []
        self.current = 0
        self._depth = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Device":
        if self._depth == 0:
            self._pretend()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._depth -= 1
        if self._depth == 0:
            torch._C._set_only_lift_cpu_tensors(False)  # type: ignore[attr-defined]
            self._patch.undo()

    def _pretend(self) -> None:
        """Make torch.cuda say what it would of two devices."""
        if not torch.backends.cuda.is_built():
            _register_guard()
        patch = self._patch
        for name, answer in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: self.current,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "stand-in",
            "synchronize": self._synchronize,
            "device": self._guard,
            "device_of": lambda tensor: self._guard(tensor.device),
            "Event": Event,
            "current_stream": lambda device=None: device,
        }.items():
            patch.setattr(torch.cuda, name, answer)
        if not self._interpreted:
            patch.setattr("dittools.kernels.triton_block_sparse.launch", launch)
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]

    @contextmanager
    def _guard(self, device: Any) -> Iterator[None]:
        """torch.cuda.device."""
        before = self.current
        self.current = device if isinstance(device, int) else (torch.device(device).index or 0)
        try:
            yield
        finally:
            self.current = before

    def _synchronize(self, device: Any = None) -> None:
        self.wait(f"all of {device}")

    def wait(self, kind: str) -> None:
        """Note that the host waits here."""
        frame = sys._getframe(1)
        where = "outside"
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(LIBRARY):
                where = f"{name[len(LIBRARY) + 1 :]}:{frame.f_lineno}"
                break
            frame = frame.f_back  # type: ignore[assignment]
        self.waits.append(Wait(kind, where))

    def counted(self) -> Counter[Wait]:
        """Return what was noted so far, and forget it."""
        found = Counter(self.waits)
        self.waits.clear()
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        standing = [t for t in flat if isinstance(t, StandIn)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if not standing and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "dittools":
            with self:
                return _PYTHON_OPS[name]()(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs, target)
        self._check(func, name, args, standing, flat, kwargs)
        device = _placed(target) if target is not None else standing[0].device
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        outer = {id(t.inner): t for t in standing}
        args, kwargs = tree_map(_unwrap, (args, kwargs))
        return tree_map(lambda t: _wrap(t, device, outer), func(*args, **kwargs))

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, target: Any) -> Any:
        """Copies are the one operator between devices."""
        if name == "copy_":
            to, source = args[0].device, args[1].device
        else:
            source = args[0].device
            to = source if target is None else target
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        if source.type == "cuda" and to.type == "cpu":
            self.wait("to the host")
        elif source.type == "cpu" and to.type == "cuda" and not _unawaited(args, kwargs):
            self.wait("to the device")
        given = args
        args, kwargs = tree_map(_unwrap, (args, kwargs))
        out = func(*args, **kwargs)
        if name == "copy_":
            return given[0]
        return StandIn(out, _placed(to)) if to.type == "cuda" else out

    def _check(
        self, func: Any, name: str, args: Any, standing: list[StandIn], flat: Any, kwargs: Any
    ) -> None:
        """Refuse what CUDA refuses and note what it waits for."""
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"the stand-in device has no {func}")
        devices = {t.device for t in standing}
        if len(devices) > 1:
            raise Mixed(f"{func} mixes {sorted(map(str, devices))}")
        beside = [
            t
            for t in flat
            if isinstance(t, torch.Tensor) and not isinstance(t, StandIn) and t.dim() > 0
        ]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            beside = self._check_index(func, args, beside)
        if beside and standing:
            shapes = [tuple(t.shape) for t in beside]
            raise Mixed(f"{func} mixes {standing[0].device} with CPU tensors of {shapes}")
        if any(isinstance(a, torch.Generator) and a.device.type == "cpu" for a in flat):
            raise Mixed(f"{func} expects a 'cuda' device type for generator but found 'cpu'")
        if name in PRODUCTS and any(not t.dtype.is_floating_point for t in standing):
            raise Mixed(f'"{name}_cuda" not implemented for {standing[-1].dtype}')
        if any(t.dtype in NARROW for t in standing) and name not in MOVES:
            raise Mixed(f'"{name}" not implemented for {[t.dtype for t in standing]}')
        if name == "segment_reduce" and not kwargs.get("unsafe"):
            self.wait(name)  # lengths are looked at
        if name in WAITS or (
            name == "repeat_interleave"
            and isinstance(args[0], StandIn)
            and len(args) == 1
            and not any(isinstance(a, int) for a in flat)
        ):
            self.wait(name)

    def _check_index(self, func: Any, args: Any, beside: list[torch.Tensor]) -> list[torch.Tensor]:
        """Positions on the CPU are copied; those on the device reach no tensor on the CPU."""
        indices = [t for t in args[1] if t is not None]
        if not isinstance(args[0], StandIn):
            raise Mixed(f"{func}: indices should be either on cpu or on the device of the tensor")
        for index in indices:
            if not isinstance(index, StandIn):
                self.wait("to the device")
            elif index.dtype in (torch.bool, torch.uint8):
                self.wait("bool index")
        return [t for t in beside if not any(t is index for index in indices)]


def _placed(device: torch.device) -> torch.device:
    return torch.device("cuda", 0 if device.index is None else device.index)


def _unawaited(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy is asked for without waiting: non_blocking is the third place of `copy_`."""
    return bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, StandIn) else value


def _wrap(value: Any, device: torch.device, outer: dict[int, StandIn]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return outer[id(value)] if id(value) in outer else StandIn(value, device)


def _attend() -> Callable[..., Any]:
    from dittools.patches.op import attend_op

    return attend_op._init_fn


def _block_sparse() -> Callable[..., Any]:
    from dittools.kernels.program import block_sparse

    return block_sparse._init_fn


_PYTHON_OPS = {"attend": _attend, "block_sparse": _block_sparse}


def move(module: torch.nn.Module, device: str = "cuda:0") -> torch.nn.Module:
    """Put the parameters and buffers of a module on the stand-in device; call it within one."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(
                    value.detach().to(device), requires_grad=value.requires_grad
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = value.to(device)
    return module


class Event:
    """torch.cuda.Event of work that is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        """Remember where; a stream is named by its device."""
        self.stream = stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: Any,
    bias: torch.Tensor | None,
    scale: float,
    config: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `triton_block_sparse.launch` returns, worked out on the CPU from the same arguments."""
    from dittools.call import AttentionCall
    from dittools.grid import TokenGrid
    from dittools.kernels import load
    from dittools.kernels.program import Program, _mask_of

    given = [t for t in (query, key, value, bias, *made) if isinstance(t, torch.Tensor)]
    if {t.device for t in given} != {query.device}:
        raise Mixed(f"the kernel was given {[str(t.device) for t in given]}")
    query, key, value, bias = (_unwrap(t) for t in (query, key, value, bias))
    made = Program(*(_unwrap(part) for part in made))
    made.check(query.shape[1], key.shape[1])
    grid = TokenGrid(1, 1, query.shape[1])
    call = AttentionCall(query, key, value, grid, scale=scale, key_bias=bias)
    mask = _mask_of(made, query.shape[1], key.shape[1])
    out, lse = load("cpu").block_sparse(call, mask, return_lse=True)
    return StandIn(out.contiguous(), given[0].device), StandIn(lse.contiguous(), given[0].device)
