"""Why a call can only be run by the stock function, found without looking at the plan."""

from dataclasses import replace
from typing import Any

import torch

from dittools.patches.sites import SeamCall

KEEPS_ALL = "the method keeps every pair at this size"
NOT_FINITE = "query, key or value holds NaN or infinity"
UNKNOWN_LENGTH = (
    "the length of the run is unknown, so shares of it and last steps cannot be told: "
    "attach to the pipeline, or count dense steps from the first in whole numbers"
)
RING = (
    "ring context parallelism hands over a part of the keys at a time and does not say which, so a "
    "mask of the whole sequence cannot be cut for it; ulysses_degree runs plans"
)
UNKNOWN_SPLIT = "how context parallelism splits the text of this family is not known"
UNKNOWN_BRANCH = (
    "the guidance branch of a call is not known (both run as one batch, or there is no guidance), "
    "so rules for one branch are left out"
)


def refusal(call: SeamCall) -> str:
    """Return why only the stock function can run a call, "" when methods can."""
    options = call.options
    if options.get("is_causal"):
        return "causal attention"
    if options.get("dropout_p"):
        return "attention dropout"
    if options.get("attention_kwargs"):
        return "the processor passes backend-specific attention arguments"
    if any(type(m).__name__ == "AttentionScoreSkipFunctionMode" for m in _function_modes()):
        return "perturbed attention guidance skips the attention scores here"
    return ""


def parallel_refusal(call: SeamCall) -> str:
    """Return why a plan cannot run on a sequence split over devices, "" when it can."""
    config = getattr(call.options["parallel_config"], "context_parallel_config", None)
    if config is None:
        return "the sequence is split in a way other than context parallelism"
    if config.ring_degree > 1:
        return RING
    if call.key.shape[2] != call.query.shape[2]:
        return "grouped key and value heads under context parallelism"
    if torch.is_grad_enabled() and call.query.requires_grad:
        return "gradients through context parallelism"
    return refusal(replace(call, options={**call.options, "parallel_config": None}))


def _function_modes() -> list[Any]:
    if not torch._C._len_torch_function_stack():
        return []
    from torch.overrides import _get_current_function_mode_stack

    modes: list[Any] = list(_get_current_function_mode_stack())
    return modes


def is_finite(*tensors: torch.Tensor) -> bool:
    """Whether no tensor holds NaN or infinity: one sum each, one wait for the device."""
    return bool(finite_flag(*tensors))


def finite_flag(*tensors: torch.Tensor) -> torch.Tensor:
    """Return the same as a 0-d bool tensor, without a wait."""
    total = tensors[0].sum(dtype=torch.float32)
    for tensor in tensors[1:]:
        total = total + tensor.sum(dtype=torch.float32)
    return torch.isfinite(total)
