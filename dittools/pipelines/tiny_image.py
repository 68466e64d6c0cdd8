"""Toy image pipelines, one builder per family."""

from collections.abc import Callable
from typing import Any

import torch

from dittools.pipelines.tiny_parts import (
    clip,
    flow,
    gemma2,
    image_vae,
    qwen3,
    t5,
    tokenizer,
    wan_vae,
)


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
    # the stock template's 34 tokens are cut off again, which a toy vocabulary does not survive
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
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

        @register_to_config  # type: ignore[untyped-decorator]
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


def flux2() -> Any:
    """Return a toy Flux.2 klein pipeline."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return Flux2KleinPipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=qwen3(causal=True),
        tokenizer=tokenizer("chat", 512),
        transformer=transformer,
    )


def z_image() -> Any:
    """Return a toy Z-Image pipeline."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # the stock constructor leaves them uninitialised
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        scheduler=flow(),
        vae=image_vae(16, blocks=2),
        text_encoder=qwen3(),
        tokenizer=tokenizer("chat", 512),
        transformer=transformer,
    )


def lumina2() -> Any:
    """Return a toy Lumina-Image 2 pipeline."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=image_vae(4),
        text_encoder=gemma2(),
        tokenizer=tokenizer("t5", 64),
    )


def sana() -> Any:
    """Return a toy Sana pipeline."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    return SanaPipeline(
        tokenizer=tokenizer("t5", 64),
        text_encoder=gemma2(),
        vae=vae,
        transformer=transformer,
        scheduler=flow(shift=3.0),
    )


_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 2,
}


def sd() -> Any:
    """Return a toy Stable Diffusion 1.5 pipeline, with attention at two resolutions."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=image_vae(4, blocks=2),
        text_encoder=clip(32),
        tokenizer=tokenizer("clip"),
        unet=UNet2DConditionModel(**_UNET, cross_attention_dim=32, attention_head_dim=2),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Return a toy Stable Diffusion XL pipeline: no attention at full latent resolution."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    levels = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(
        **{**_UNET, **levels},
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(4, blocks=2),
        text_encoder=clip(32),
        text_encoder_2=clip(32, 32),
        tokenizer=tokenizer("clip"),
        tokenizer_2=tokenizer("clip"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


_TEXT = {"max_sequence_length": 16}
_PLAIN = {"use_resolution_binning": False, "clean_caption": False}

BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "sd3": sd3,
    "pixart": pixart,
    "cosmos": cosmos,
    "auraflow": auraflow,
    "z_image": z_image,
    "lumina2": lumina2,
    "sd": sd,
    "sdxl": sdxl,
    "sana": sana,
}
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"height": 16, "width": 24, **_TEXT},
    "flux2": {"height": 16, "width": 24, "text_encoder_out_layers": (1,), **_TEXT},
    "qwen_image": {"height": 32, "width": 48, "negative_prompt": "a blue square", **_TEXT},
    "sd3": {"height": 16, "width": 24, **_TEXT},
    "pixart": {"height": 16, "width": 24, **_PLAIN, **_TEXT},
    "cosmos": {"height": 64, "width": 96, **_TEXT},
    "auraflow": {"height": 32, "width": 48, **_TEXT},
    "z_image": {"height": 32, "width": 48, **_TEXT},
    "lumina2": {"height": 64, "width": 96, "system_prompt": "a", "max_sequence_length": 32},
    "sd": {"height": 32, "width": 48},
    "sdxl": {"height": 32, "width": 48},
    "sana": {"height": 32, "width": 64, "complex_human_instruction": None, **_PLAIN, **_TEXT},
}
