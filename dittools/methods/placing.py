"""Small tensors of the CPU on the device of a call, without making that device wait."""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def placed(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a table that is cached somewhere on a device: itself, or the same copy every time."""
    if table.device == device:
        return table
    copies: dict[torch.device, torch.Tensor] = _COPIES.setdefault(table, {})
    if device not in copies:
        copies[device] = table.to(device)
    return copies[device]


def sent(fresh: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on a device; what the device has yet to do is not waited for."""
    # CUDA has read pageable memory when this returns; other devices need not have
    return fresh.to(device, non_blocking=device.type == "cuda")


def label_counts(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 [count]: how often each label stands in int64 [n]."""
    if labels.device.type == "cpu":
        return torch.bincount(labels, minlength=count)
    # bincount would read the least and largest label back
    return labels.new_zeros(count).index_add_(0, labels, torch.ones_like(labels))
