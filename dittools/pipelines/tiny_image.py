"""Toy image pipelines, one builder per family."""

from collections.abc import Callable
from typing import Any

import torch

from dittools.pipelines.tiny_parts import clip, flow, image_vae, t5, tokenizer, wan_vae


def flux() -> Any:
    """Return a toy Flux.1 pipeline."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=flow(),
        vae=image_vae(1),
        text_encoder=clip(32),
        tokenizer=tokenizer("clip"),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
    )


def sd3() -> Any:
    """Return a toy Stable Diffusion 3.5 medium pipeline: block 0 has a second attention."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=image_vae(4),
        text_encoder=clip(32, 32),
        tokenizer=tokenizer("clip"),
        text_encoder_2=clip(32, 32),
        tokenizer_2=tokenizer("clip"),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
    )


def qwen_image() -> Any:
    """Return a toy Qwen-Image pipeline."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1000,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 3,
            "eos_token_id": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        hidden_size=16,
        vocab_size=1000,
        vision_end_token_id=992,
        vision_start_token_id=991,
        vision_token_id=993,
        image_token_id=994,
        video_token_id=995,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = QwenImagePipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer("chat", 1024),
        transformer=transformer,
    )
    pipe.prompt_template_encode_start_idx = 3  # of the stock 34 tokens a toy prompt would not last
    return pipe


def pixart() -> Any:
    """Return a toy PixArt-Sigma pipeline."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=image_vae(4, blocks=2),
        transformer=transformer,
        scheduler=DDIMScheduler(),
    )


def cosmos() -> Any:
    """Return a toy Cosmos-Predict2 text-to-image pipeline."""
    from diffusers import Cosmos2TextToImagePipeline, CosmosTransformer3DModel
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class NoSafetyChecker(ModelMixin, ConfigMixin):  # type: ignore[misc]
        """Lets everything pass: the stock checker is a download."""

        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.device_marker = torch.nn.Parameter(torch.zeros(1))

        def check_text_safety(self, prompt: str) -> bool:
            return True

        def check_video_safety(self, video: Any) -> Any:
            return video

    transformer = CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # resizing the mask needs torchvision
        extra_pos_embed_type="learnable",
    )
    return Cosmos2TextToImagePipeline(
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=transformer,
        vae=wan_vae(),
        scheduler=flow(use_karras_sigmas=True),
        safety_checker=NoSafetyChecker(),
    )


def auraflow() -> Any:
    """Return a toy AuraFlow pipeline."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("umt5"),
        vae=image_vae(4, blocks=2),
        transformer=transformer,
        scheduler=flow(),
    )


_TEXT = {"max_sequence_length": 16}

BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "sd3": sd3,
    "qwen_image": qwen_image,
    "pixart": pixart,
    "cosmos": cosmos,
    "auraflow": auraflow,
}
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"height": 16, "width": 24, **_TEXT},
    "sd3": {"height": 16, "width": 24, **_TEXT},
    "qwen_image": {"height": 32, "width": 48, "negative_prompt": "a blue square", **_TEXT},
    "pixart": {
        "height": 16,
        "width": 24,
        "use_resolution_binning": False,
        "clean_caption": False,
        **_TEXT,
    },
    "cosmos": {"height": 32, "width": 48, **_TEXT},
    "auraflow": {"height": 32, "width": 48, **_TEXT},
}
