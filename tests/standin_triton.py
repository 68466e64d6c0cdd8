"""The Triton launchers on a device that is not there, the kernel in Triton's interpreter.

Run as a script under TRITON_INTERPRET=1; prints one JSON object per line.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from standin import Device, Mixed, StandIn
from triton.runtime.interpreter import GridExecutor
from triton_cases import Case, build

from dittools.call import AttentionCall
from dittools.kernels import Backend, load, triton_backend
from dittools.kernels.program import program
from dittools.kernels.reference import ReferenceBackend

PLACE = "cuda:1"  # while the current device is another
CASES = [
    ("triton", "none", Case(3, dtype="fp16", order="padded", text=11, bias="dropped")),
    ("triton", "none", Case(4, order="heads", extra=13, bias="heads", layout="packed")),
    ("triton_int8_int8", "int8", Case(7, dtype="fp16", kv_block=32, mask_heads=1, order="shared")),
]


@contextmanager
def interpreted_launches(device: Device) -> Iterator[list[int]]:
    """Run kernels that are launched on stand-in tensors; gives the device of every launch."""
    plain, launched = GridExecutor.__call__, []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        places = {t.device for t in args if isinstance(t, torch.Tensor)}
        if {place.type for place in places} == {"cuda"}:
            (place,) = places
            launched.append(place.index)
            if device.current != place.index:
                raise Mixed(f"launched on cuda:{device.current} with tensors of {place}")
            args = tuple(t.inner if isinstance(t, StandIn) else t for t in args)
        elif places:
            raise Mixed(f"launched with tensors of {sorted(map(str, places))}")
        return plain(self, *args, **kwargs)

    GridExecutor.__call__ = run
    try:
        yield launched
    finally:
        GridExecutor.__call__ = plain


def there(call: AttentionCall, device: str) -> AttentionCall:
    """Return a call with its tensors on a device."""
    names = ("query", "key", "value", "key_mask", "key_bias")
    tensors = {name: getattr(call, name) for name in names}
    return replace(call, **{n: t if t is None else t.to(device) for n, t in tensors.items()})


def run(name: str, quantize: str, case: Case) -> dict[str, object]:
    """Return how far a launch is from the specification, and where and how it ran."""
    call, mask = build(case)
    call = replace(call, quantize=quantize)
    want, want_lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
    backend: Backend = load(name)
    with Device(interpreted=True) as device, interpreted_launches(device) as launched:
        asked = there(call, PLACE)
        refused = backend.not_supported(asked, mask)
        program(mask.to(asked.query.device), asked)  # lists and copies are made once
        program(mask, asked)
        device.counted()
        out, lse = backend.block_sparse(asked, mask, return_lse=True)
        waits = device.counted()
    kept = want_lse > float("-inf")
    apart = (out.inner.float() - want.float()).norm() / want.float().norm()
    return {
        "name": f"{name}-{case.name}",
        "refused": refused,
        "device": str(out.device),
        "launched": launched,
        "waits": {f"{wait.kind} {wait.where}": count for wait, count in waits.items()},
        "apart": float(apart),
        "lse_error": float((lse.inner - want_lse)[kept].abs().max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton_backend.INTERPRETED = False  # go the way of a device
    for name, quantize, case in CASES:
        sys.stdout.write(json.dumps(run(name, quantize, case)) + "\n")
