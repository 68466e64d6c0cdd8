"""Toy video pipelines, one builder per family."""

from collections.abc import Callable
from typing import Any

from dittools.pipelines.tiny_parts import clip, flow, t5, tokenizer, wan_vae


_WAN: dict[str, Any] = {
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


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_WAN)


def wan() -> Any:
    """Return a toy Wan 2.1 text-to-video pipeline."""
    from diffusers import WanPipeline

    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("umt5"),
        vae=wan_vae(),
        transformer=_wan_transformer(),
        scheduler=flow(shift=7.0),
    )


def wan22() -> Any:
    """Return a toy Wan 2.2 pipeline with two transformers that share one run."""
    from diffusers import WanPipeline

    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("umt5"),
        vae=wan_vae(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(),
        boundary_ratio=0.9,
        scheduler=flow(shift=7.0),
    )


def wan_vace() -> Any:
    """Return a toy Wan pipeline with VACE control blocks."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    transformer = WanVACETransformer3DModel(
        **{**_WAN, "num_layers": 3}, vace_layers=[0, 2], vace_in_channels=96
    )
    return WanVACEPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("umt5"),
        vae=wan_vae(),
        transformer=transformer,
        scheduler=flow(shift=7.0),
    )


def ltx() -> Any:
    """Return a toy LTX-Video pipeline."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        num_layers=2,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return LTXPipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def cogvideox() -> Any:
    """Return a toy CogVideoX pipeline with rotary positions, as the 5B model has."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def hunyuan_video() -> Any:
    """Return a toy HunyuanVideo pipeline."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import LlamaConfig, LlamaModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    llama = LlamaConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=flow(shift=7.0),
        text_encoder_2=clip(8),
        tokenizer_2=tokenizer("clip"),
    )


_TEXT = {"max_sequence_length": 16}

BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "wan22": wan22,
    "wan_vace": wan_vace,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
}
CALLS: dict[str, dict[str, Any]] = {
    "wan": {"height": 32, "width": 48, "num_frames": 9, **_TEXT},
    "wan22": {"height": 32, "width": 48, "num_frames": 9, **_TEXT},
    "wan_vace": {"height": 32, "width": 48, "num_frames": 9, **_TEXT},
    "ltx": {"height": 32, "width": 64, "num_frames": 9, **_TEXT},
    "cogvideox": {"height": 32, "width": 48, "num_frames": 9, **_TEXT},
    "hunyuan_video": {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "prompt_template": {"template": "{}", "crop_start": 0},
        **_TEXT,
    },
}
