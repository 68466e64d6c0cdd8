"""Why a call can only be run by the stock function, found without looking at the plan."""

from typing import Any

import torch

from dittools.patches.sites import SeamCall

KEEPS_ALL = "the method keeps every pair at this size"
NOT_FINITE = "query, key or value holds NaN or infinity"
UNKNOWN_LENGTH = (
    "the length of the run is unknown, so shares of it and last steps cannot be told: "
    "attach to the pipeline, or count dense steps from the first in whole numbers"
)
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
    if options.get("parallel_config") is not None:
        return "context parallelism splits the sequence over devices"
    if any(type(m).__name__ == "AttentionScoreSkipFunctionMode" for m in _function_modes()):
        return "perturbed attention guidance skips the attention scores here"
    return ""


def _function_modes() -> list[Any]:
    if not torch._C._len_torch_function_stack():
        return []
    from torch.overrides import _get_current_function_mode_stack

    modes: list[Any] = list(_get_current_function_mode_stack())
    return modes


def is_finite(*tensors: torch.Tensor) -> bool:
    """Whether no tensor holds NaN or infinity: one sum each, one wait for the device."""
    total = tensors[0].sum(dtype=torch.float32)
    for tensor in tensors[1:]:
        total = total + tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total))
