"""HeadHunter and SoftPAG: guidance away from a pass in which chosen heads attend to themselves.

A selected head's attention map A becomes (1 - u) A + u I, so its output becomes (1 - u) O + u V
and no identity is ever built. The prediction with such heads, eps_p, guides the conditional one:
eps_c + scale (eps_c - eps_p) without classifier-free guidance, and
eps_u + g (eps_c - eps_u) + scale (eps_c - eps_p) with it.

Source: arXiv:2506.10978 (Where and How to Perturb), sections 3 and 4.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dittools.errors import InputError
from dittools.methods.base import bad_param, check_params, param
from dittools.methods.naming import named

_NAME = re.compile(r"L(\d{1,6})(?:H(\d{1,6}))?")
_ROWS = 1024  # image queries whose scores over the text are held at a time


@named
@dataclass(frozen=True)
class HeadHunter:
    """Guidance by perturbed heads: which heads, how strongly damaged, how strongly guided."""

    name: ClassVar[str] = "headhunter"
    heads: Sequence[str] = param(
        (), '"L12H3" for head 3 of layer 12, "L12" for every head of it; layers as in the report'
    )
    scale: float = param(3.0, "weight of the guidance; 3 suits SD3, 8 Flux")
    u: float = param(1.0, "share of the identity in a selected head's map", least=0.0, most=1.0)
    mode: Literal["joint", "image"] = param(
        "joint",
        "joint: every token of a selected head sees itself alone; image: image tokens see "
        "themselves and the text, text tokens are left as they are",
        choices=("joint", "image"),
    )

    def __post_init__(self) -> None:
        """Check every field, and bring the heads to one spelling each, in the order given."""
        given: Any = self.heads
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise bad_param(self, "heads", expected='a list of heads such as ["L12H3"], not empty')
        names = tuple(dict.fromkeys(_spelt(self, head) for head in given))
        object.__setattr__(self, "heads", names)
        check_params(self)
        if not math.isfinite(self.scale):
            raise bad_param(self, "scale", expected="a finite number")

    @property
    def needs_pass(self) -> bool:
        """Whether the perturbed pass can change anything."""
        return self.u > 0 and self.scale != 0

    def by_layer(self, heads: Sequence[int], model: str) -> dict[int, tuple[int, ...]]:
        """Return the selected heads of each layer that has any, ascending.

        Args:
            heads: head count of every layer of the model.
            model: its class, for the error.
        Raises:
            InputError: a head the model does not have.
        """
        found: dict[int, set[int]] = {}
        for name in self.heads:
            layer, head = parse_head(name)
            if layer >= len(heads):
                raise _absent(name, model, f"layers L0 to L{len(heads) - 1}")
            if head is not None and head >= heads[layer]:
                raise _absent(name, model, f"heads H0 to H{heads[layer] - 1} in layer {layer}")
            chosen = range(heads[layer]) if head is None else (head,)
            found.setdefault(layer, set()).update(chosen)
        return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def parse_head(name: str) -> tuple[int, int | None]:
    """Return (layer, head) of "L12H3"; head None for a whole layer.

    Raises:
        InputError: another spelling.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError("this is no head", expected='"L12H3", or "L12"', got=repr(name))
    return int(match[1]), None if match[2] is None else int(match[2])


def head_name(layer: int, head: int) -> str:
    """Return "L12H3" of (12, 3)."""
    return f"L{layer}H{head}"


def _spelt(owner: HeadHunter, head: Any) -> str:
    """Return the one spelling of a head given as "l12h3", "L12" or (12, 3)."""
    if isinstance(head, str) and _NAME.fullmatch(head.strip().upper()):
        layer, number = parse_head(head.strip().upper())
        return f"L{layer}" if number is None else head_name(layer, number)
    if (
        isinstance(head, (tuple, list))
        and len(head) == 2
        and all(type(n) is int and n >= 0 for n in head)
    ):
        return head_name(*head)
    raise InputError(
        f"{owner.name}: {head!r} is no head",
        expected='"L12H3" (layer 12, head 3), "L12" (all its heads) or (12, 3)',
    )


def _absent(name: str, model: str, there: str) -> InputError:
    return InputError(
        f"{model} has no head {name}",
        expected=there,
        remedy="heads found for this model: `dittools search --objective guidance`",
    )


def blend(output: torch.Tensor, value: torch.Tensor, u: float) -> torch.Tensor:
    """Return (1 - u) output + u value, computed in fp32, in the dtype of output."""
    if u == 0:
        return output
    mixed = torch.lerp(output.float(), value.float(), u) if u < 1 else value
    return mixed.to(output.dtype)


def self_and_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image: slice,
    scale: float,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what image tokens see when image keys other than their own are masked.

    Args:
        query: [B, S, H, D] of the joint sequence; key and value alike.
        image: where its image tokens are; everything else is text.
        scale: factor on the scores.
        keep: bool [B, S], False drops a key; None keeps all.
    Returns:
        [B, image tokens, H, D] in the dtype of value; scores and sums are fp32.
    Source: the logit mask of diffusers' PAGJointAttnProcessor2_0.
    """
    others = [slice(0, image.start), slice(image.stop, query.shape[1])]
    text_key, text_value = (torch.cat([x[:, o] for o in others], 1).float() for x in (key, value))
    drop = None if keep is None else ~torch.cat([keep[:, o] for o in others], 1)[:, None, None]
    parts = []
    for start in range(image.start, image.stop, _ROWS):
        rows = slice(start, min(start + _ROWS, image.stop))
        q, k, v = (x[:, rows].float() for x in (query, key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, text_key) * scale
        if drop is not None:
            scores = scores.masked_fill(drop, float("-inf"))
        own = ((q * k).sum(-1) * scale).transpose(1, 2)[..., None]
        weight = torch.cat([scores, own], -1).softmax(-1)
        seen = torch.einsum("bhqk,bkhd->bqhd", weight[..., :-1], text_value)
        parts.append(seen + weight[..., -1].transpose(1, 2)[..., None] * v)
    return torch.cat(parts, 1).to(value.dtype)
