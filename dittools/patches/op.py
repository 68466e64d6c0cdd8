"""The one custom op behind which torch.compile does not look.

Step, branch, grid and plan are read in its body, at run time; the graph holds only tensors, the
site's number as a 0-d CPU tensor (so that all layers share one graph) and call options.
"""

import torch

from dittools.patches.sites import ORIGINALS, SeamCall, site_of


@torch.library.custom_op("dittools::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    site: torch.Tensor,
    original: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> torch.Tensor:
    """Return attention of one site, contiguous, in the layout of `original`."""
    options: dict[str, object] = {"attn_mask": attn_mask, "dropout_p": dropout_p}
    options |= {"is_causal": is_causal}
    options |= {"scale": scale, "enable_gqa": enable_gqa}
    if not ORIGINALS[original].heads_first and backend:
        options["backend"] = backend
    call = SeamCall(query, key, value, options, original)
    found = site_of(site)
    out = call.dense() if found is None else found.root.attend(found, call)
    shares = out.untyped_storage().data_ptr() in {
        t.untyped_storage().data_ptr() for t in (query, key, value)
    }
    return out.clone(memory_format=torch.contiguous_format) if shares else out.contiguous()


@attend_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    site: torch.Tensor,
    original: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
