"""The transformer's forward pass as training needs it, and a small sampler for probes.

It computes what WanTransformer3DModel.forward computes, with two liberties: frames may be any
subset of the clip at their true rotary times, and the text's zero padding is folded into a few
slots whose logits carry the log of how many pads they stand for, which is exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dittools.pipelines.demo.model import HEAD_DIM, HEADS, TEXT_DIM, build_scheduler

TEXT_TOKENS = 14  # longest caption, "</s>" included
EPSILON = 1e-6  # of the query and key norms, as in WanTransformer3DModel
FOLDED = 2  # slots that stand for the other pads
SHORT = 576  # tokens up to which the plain product beats the fused kernel's backward pass
PROMPT_TOKENS = 512  # what WanPipeline pads to by default

BlockForward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Rotary:
    """Rotary angles of a set of tokens, each [1, tokens, 1, HEAD_DIM / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary(model: WanTransformer3DModel, frames: torch.Tensor, height: int, width: int) -> Rotary:
    """Return the angles of the given frame numbers [F] over a full height x width grid."""
    sizes = [model.rope.t_dim, model.rope.h_dim, model.rope.w_dim]
    shape = (len(frames), height, width, -1)
    index = (frames, torch.arange(height), torch.arange(width))
    view = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    parts = []
    for table in (model.rope.freqs_cos, model.rope.freqs_sin):
        split = [
            axis[number, ::2].view(*where, axis.shape[1] // 2).expand(shape)
            for axis, number, where in zip(table.split(sizes, dim=1), index, view, strict=True)
        ]
        parts.append(torch.cat(split, dim=-1).flatten(0, 2)[None, :, None].float())
    return Rotary(*parts)


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str]
) -> torch.Tensor:
    """Return [B, 16, 64]: word states, zeros after "</s>", and the folded slots."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    mask = tokens["attention_mask"]
    states = encoder(tokens["input_ids"], mask).last_hidden_state * mask[..., None]
    return torch.cat([states, states.new_zeros(len(captions), FOLDED, TEXT_DIM)], dim=1)


def text_bias() -> torch.Tensor:
    """Return the logit bias [1, 1, 1, 16] that makes the folded slots count as all pads."""
    bias = torch.zeros(TEXT_TOKENS + FOLDED)
    bias[TEXT_TOKENS:] = math.log((PROMPT_TOKENS - TEXT_TOKENS) / FOLDED)
    return bias.view(1, 1, 1, -1)


def velocity(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    angles: Rotary,
    block_forward: BlockForward | None = None,
) -> torch.Tensor:
    """Return the predicted noise - clean, [B, C, F, h, w].

    Args:
        model: patch size (1, 1, 1).
        latents: [B, C, F, h, w], noisy.
        sigma: [B], noise share in 0..1.
        text: [B, 16, 64] from encode_captions.
        angles: rotary angles of the F frames.
        block_forward: a compiled stand-in for `run_block`.
    """
    run = block_forward or run_block
    embedding = model.patch_embedding
    tokens = latents.flatten(2).transpose(1, 2)  # [B, S, C]
    tokens = F.linear(tokens, embedding.weight.flatten(1), embedding.bias).float()
    time, modulation, words, _ = model.condition_embedder(sigma * 1000, text, None)
    modulation = modulation.unflatten(1, (6, -1)).float()
    bias = text_bias()
    for block in model.blocks:
        tokens = run(block, tokens, words, bias, modulation, angles.cos, angles.sin)
    shift, scale = (model.scale_shift_table + time.unsqueeze(1).float()).chunk(2, dim=1)
    out = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift).float()
    result: torch.Tensor = out.transpose(1, 2).unflatten(2, latents.shape[2:])
    return result


def run_block(
    block: WanTransformerBlock,
    tokens: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor,
    modulation: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Return a block's output [B, S, D]; the residual stream stays in fp32."""
    table = (block.scale_shift_table + modulation).chunk(6, dim=1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table
    normed = block.norm1(tokens) * (1 + scale) + shift
    tokens = tokens + _self_attention(block.attn1, normed, cos, sin) * gate
    tokens = tokens + _cross_attention(block.attn2, block.norm2(tokens), words, bias)
    normed = block.norm3(tokens) * (1 + ffn_scale) + ffn_shift
    result: torch.Tensor = tokens + block.ffn(normed) * ffn_gate
    return result


def _self_attention(
    attn: WanAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    value = attn.to_v(x)
    query = rotate(rms(attn.norm_q, attn.to_q(x)), cos, sin).to(value.dtype)
    key = rotate(rms(attn.norm_k, attn.to_k(x)), cos, sin).to(value.dtype)
    heads = (HEADS, HEAD_DIM)
    query, key, value = (t.unflatten(-1, heads).transpose(1, 2) for t in (query, key, value))
    if x.shape[1] <= SHORT:
        scores = (query @ key.transpose(-1, -2)).float() * HEAD_DIM**-0.5
        out = scores.softmax(-1).to(value.dtype) @ value
    else:
        out = F.scaled_dot_product_attention(query, key, value)
    result: torch.Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return result


def _cross_attention(
    attn: WanAttention, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    value = attn.to_v(words)
    query = rms(attn.norm_q, attn.to_q(x)).to(value.dtype)
    key = rms(attn.norm_k, attn.to_k(words)).to(value.dtype)
    heads = (HEADS, HEAD_DIM)
    query, key, value = (t.unflatten(-1, heads).transpose(1, 2) for t in (query, key, value))
    scores = (query @ key.transpose(-1, -2)).float() * HEAD_DIM**-0.5 + bias
    out = scores.softmax(-1).to(value.dtype) @ value
    result: torch.Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return result


def rms(norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Return a query or key [B, S, D] normalised over all heads at once, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * norm.weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return a query or key [B, S, D] turned by the rotary angles of its tokens."""
    pairs = x.unflatten(-1, (HEADS, HEAD_DIM // 2, 2))
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(2)


@torch.no_grad()
def sample(
    model: WanTransformer3DModel,
    text: torch.Tensor,
    empty: torch.Tensor,
    noise: torch.Tensor,
    frames: torch.Tensor,
    steps: int = 12,
    guidance: float = 4.0,
) -> torch.Tensor:
    """Return clean latents [B, C, F, h, w] by the pipeline's recipe, for any subset of frames.

    Args:
        model: the transformer.
        text: [B, 16, 64] from encode_captions.
        empty: [1, 16, 64], the empty caption.
        noise: [B, C, F, h, w].
        frames: [F] frame numbers.
        steps: UniPC steps.
        guidance: classifier-free guidance scale.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    angles = rotary(model, frames, *noise.shape[3:])
    empty = empty.expand(len(text), -1, -1)
    latents = noise
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).expand(len(text))
        without = velocity(model, latents, sigma, empty, angles)
        towards = velocity(model, latents, sigma, text, angles)
        flow = without + guidance * (towards - without)
        latents = scheduler.step(flow, timestep, latents, return_dict=False)[0]
    return latents
