"""Which of several processes this one is, as `accelerate launch` or `torchrun` describe them."""

import os

import torch


def place() -> tuple[int, int]:
    """Return rank and number of processes; joins the group the launcher describes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    from accelerate import PartialState  # type: ignore[import-untyped]

    state = PartialState(cpu=not torch.cuda.is_available())
    return int(state.process_index), int(state.num_processes)


def is_main() -> bool:
    """Whether this process writes the results."""
    return place()[0] == 0


def own_device(device: str) -> str:
    """Return the device of this process: "cuda" means each process its own card."""
    if device == "cuda" and place()[1] > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def finish() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
