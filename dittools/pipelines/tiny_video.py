"""Toy video pipelines, one builder per family."""

from collections.abc import Callable
from typing import Any

from dittools.pipelines.tiny_parts import t5, tokenizer, wan_vae


def _wan_transformer(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    sizes = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**sizes, **changes})


def wan() -> Any:
    """Return a toy Wan 2.1 text-to-video pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("umt5"),
        vae=wan_vae(),
        transformer=_wan_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def wan22() -> Any:
    """Return a toy Wan 2.2 pipeline with two transformers that share one run."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("umt5"),
        vae=wan_vae(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(),
        boundary_ratio=0.9,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


_TEXT = {"max_sequence_length": 16}

BUILDERS: dict[str, Callable[[], Any]] = {"wan": wan, "wan22": wan22}
CALLS: dict[str, dict[str, Any]] = {
    "wan": {"height": 32, "width": 48, "num_frames": 9, **_TEXT},
    "wan22": {"height": 32, "width": 48, "num_frames": 9, **_TEXT},
}
