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


def hunyuan_video15() -> Any:
    """Return a toy HunyuanVideo-1.5 pipeline, guided."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    language = Qwen2_5_VLTextConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        bos_token_id=3,
        eos_token_id=2,
    )
    pipe = HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(language),
        tokenizer=tokenizer("chat", 512),
        transformer=transformer,
        vae=vae,
        scheduler=flow(shift=7.0),
        text_encoder_2=t5(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )
    # the stock 108 template tokens and 1000 prompt tokens are far beyond a toy prompt
    pipe.prompt_template_encode_start_idx = 0
    pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 16
    pipe.system_message = "a video of"
    return pipe


def mochi() -> Any:
    """Return a toy Mochi pipeline."""
    import torch
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    with torch.no_grad():  # zeros by default: no positions at all
        transformer.pos_frequencies.normal_()
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def allegro() -> Any:
    """Return a toy Allegro pipeline."""
    from diffusers import (
        AllegroPipeline,
        AllegroTransformer3DModel,
        AutoencoderKLAllegro,
        DDIMScheduler,
    )

    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    )
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    vae.enable_tiling()
    return AllegroPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(width=24),
        vae=vae,
        transformer=transformer,
        scheduler=DDIMScheduler(),
    )


def ltx2() -> Any:
    """Return a toy LTX-2 pipeline, audio included."""
    from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    gemma = Gemma3Config(
        text_config={
            "vocab_size": 1000,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "bos_token_id": 3,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=990,
        boi_token_index=991,
        eoi_token_index=992,
        mm_tokens_per_image=4,
    )
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=32,
        rope_double_precision=False,
        rope_type="split",
    )
    heads: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1}
    heads["num_learnable_registers"] = None
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=3,
        **{f"video_connector_{name}": value for name, value in heads.items()},
        **{f"audio_connector_{name}": value for name, value in heads.items()},
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vae, audio_vae, vocoder = _ltx2_decoders()
    return LTX2Pipeline(
        scheduler=flow(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=Gemma3ForConditionalGeneration(gemma),
        tokenizer=tokenizer(),
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )


def _ltx2_decoders() -> tuple[Any, Any, Any]:
    """Return the video autoencoder, the audio autoencoder and the vocoder of LTX-2."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return vae, audio_vae, vocoder


_TEXT = {"max_sequence_length": 16}

BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "wan22": wan22,
    "wan_vace": wan_vace,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video15": hunyuan_video15,
    "mochi": mochi,
    "allegro": allegro,
    "ltx2": ltx2,
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
    "hunyuan_video15": {"height": 16, "width": 24, "num_frames": 9},
    "mochi": {"height": 32, "width": 48, "num_frames": 7, **_TEXT},
    "allegro": {"height": 32, "width": 32, "num_frames": 8, "clean_caption": False, **_TEXT},
    "ltx2": {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, **_TEXT},
}
