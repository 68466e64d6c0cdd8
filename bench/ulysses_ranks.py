"""One rank of a context-parallel run of toy pipelines on CPU: what it makes, and what it sends.

Started once per rank by `bench/scaling.py` and the tests:
    python bench/ulysses_ranks.py JOBS.json RANK RANKS STORE OUT.json

A job is {"name", "family", "plan" (file) or "method", "heads", "backend", "anything", "call",
"exchange", "stock", "nan"}: the family "demo" is the embedded model; `stock` false leaves out the
split run without a plan, where diffusers has none; `nan` puts one into the values of the first
head. Each job is generated in one process first and then over all ranks; OUT holds for each how far
both are apart, the report, and the bytes this rank sent: as the collectives were asked for, and as
its sockets counted them.
"""

import json
import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import dittools
from dittools.pipelines import load, tiny

_BYTES_SENT = 200  # offset of tcpi_bytes_sent in the kernel's struct tcp_info
_FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}


class Sent(TorchDispatchMode):
    """Counts the payload this rank hands to other ranks, by collective."""

    def __init__(self, ranks: int) -> None:
        """Start at nothing."""
        super().__init__()
        self.ranks = ranks
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at collectives, run everything."""
        name = str(getattr(function, "_schema", function)).split("(")[0].split(".")[0]
        others = self.ranks - 1
        if name == "_c10d_functional::all_to_all_single":
            splits = args[2]  # rows for each rank; those for this one stay
            row = size(args[0]) // max(sum(splits), 1)
            self.bytes["all_to_all"] += row * (sum(splits) - splits[dist.get_rank()])
        elif name == "_c10d_functional::all_gather_into_tensor":
            self.bytes["all_gather"] += size(args[0]) * others
        elif name == "c10d::allgather_":
            self.bytes["all_gather"] += sum(size(t) for t in args[1]) * others
        elif name == "c10d::allreduce_":
            self.bytes["all_reduce"] += 2 * sum(size(t) for t in args[0]) * others // self.ranks
        elif name == "c10d::send":
            self.bytes["send"] += sum(size(t) for t in args[0])
        return function(*args, **(kwargs or {}))


def size(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def socket_bytes() -> int:
    """Return the bytes that the TCP sockets of this process have sent so far; Linux only."""
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed since it was listed
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6):
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
    return total


def parallelise(denoiser: Any, rank: int, ranks: int, anything: bool) -> Callable[[], None]:
    """Do what `enable_parallelism` does, which asks for an accelerator; returns how to undo it."""
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
    from torch.distributed.device_mesh import init_device_mesh

    config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=anything)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole = ParallelConfig(context_parallel_config=config)
    whole.setup(rank, ranks, torch.device("cpu"), mesh=mesh)
    processors = [getattr(m, "processor", None) for m in denoiser.modules()]
    taking = [p for p in processors if hasattr(p, "_parallel_config")]
    for processor in taking:
        processor._parallel_config = whole
    apply_context_parallel(denoiser, config, denoiser._cp_plan)

    def undo() -> None:
        remove_context_parallel(denoiser, denoiser._cp_plan)
        for processor in taking:
            processor._parallel_config = None

    return undo


def pipeline(family: str, heads: int) -> Any:
    """Return a toy pipeline whose denoiser has that many heads, or the embedded model."""
    if family == "demo":
        return load("demo")
    pipe = tiny.build(family)
    config = dict(pipe.transformer.config)
    if heads and config["num_attention_heads"] != heads:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = type(pipe.transformer).from_config({**config, "num_attention_heads": heads})
        pipe.transformer = made.eval().requires_grad_(False)
    return pipe


def run_job(job: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Return what one job made and sent."""
    pipe = pipeline(job["family"], job.get("heads", 0))
    if job.get("nan"):
        pipe.transformer.blocks[0].attn1.to_v.bias.data[0] = float("nan")
    usual = {} if job["family"] == "demo" else tiny.call_arguments(job["family"])
    call = {**usual, "output_type": "latent", **job.get("call", {})}

    def generate() -> torch.Tensor:
        made = pipe(**call, generator=torch.Generator().manual_seed(0))
        return made[0]

    with torch.no_grad():
        dense = generate()
        chosen = job.get("plan") or job["method"]
        settings = {
            "backend": job.get("backend", "reference"),
            "exchange": job.get("exchange", "heads"),
        }
        with dittools.attach(pipe, chosen, **settings) as handle:
            alone = generate()
            single = handle.report().to_dict()
        undo = parallelise(pipe.transformer, rank, ranks, bool(job.get("anything")))
        try:
            before = socket_bytes()
            with Sent(ranks) as stock:
                split = generate() if job.get("stock", True) else dense
            middle = socket_bytes()
            with dittools.attach(pipe, chosen, **settings) as handle:
                with Sent(ranks) as sent:
                    together = generate()
                report = handle.report()
            after = socket_bytes()
            restored = generate() if job.get("stock", True) else dense
        finally:
            undo()
    scale = float(dense.abs().max())
    return {
        "error": float((together - alone).abs().max()) / scale,
        "stock_error": float((split - dense).abs().max()) / scale,
        "restored_error": float((restored - split).abs().max()) / scale,
        "sparse_gap": float((alone - dense).abs().max()) / scale,
        "single": single,
        "report": report.to_dict(),
        "text": str(report),
        "sent": dict(sent.bytes),
        "stock_sent": dict(stock.bytes),
        "socket": after - middle,
        "stock_socket": middle - before,
    }


def run_ranks(folder: Path, jobs: list[dict[str, Any]], ranks: int) -> dict[str, list[Any]]:
    """Return for each job what every rank found, each in a process of its own.

    Args:
        folder: an empty one, for files.
        jobs: as above.
        ranks: how many.
    Raises:
        RuntimeError: one of them failed; with its last words.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    outs = [folder / f"out{rank}.json" for rank in range(ranks)]
    started = []
    for rank, out in enumerate(outs):
        words = [str(folder / "jobs.json"), str(rank), str(ranks), str(folder / "store"), str(out)]
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=500)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(said)[-3000:])
    found = [json.loads(out.read_text(encoding="utf-8")) for out in outs]
    return {job["name"]: [one[job["name"]] for one in found] for job in jobs}


def main() -> None:
    """Run all jobs as one rank."""
    jobs, rank, ranks, store, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks)
    )
    found: dict[str, Any] = {}
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        try:
            found[job["name"]] = run_job(job, int(rank), int(ranks))
        except dittools.errors.DitToolsError as error:
            found[job["name"]] = {"refused": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
