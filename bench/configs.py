"""Released models as configs with random weights: real shapes, hence true times, and no download.

Numbers are those of the released config.json files: Wan2.1 T2V 1.3B and 14B, HunyuanVideo,
CogVideoX-5B and FLUX.1-dev. Time does not depend on the weights for methods whose mask is fixed by
the grid, and these alone are listed here.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

VIDEO_METHODS = ("radial", "gna", "sta")
IMAGE_METHODS = ("gna", "clear")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One denoiser at one size.

    Attributes:
        name: e.g. "wan-1.3b-480p".
        kind: class name in diffusers.
        config: arguments of the class.
        frames: of the clip, in pixels' time.
        height: pixels.
        width: pixels.
        inputs: (case, device, dtype) -> arguments of one forward.
        methods: to be timed beside dense.
        text_tokens: length of the prompt.
    """

    name: str
    kind: str
    config: dict[str, Any]
    frames: int
    height: int
    width: int
    inputs: Callable[["Case", str, torch.dtype], Inputs]
    methods: tuple[str, ...] = VIDEO_METHODS
    text_tokens: int = 512
    notes: str = field(default="random weights, one forward of one sample")

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width: 4 x in time, 8 x in space."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Image or video tokens: patches of 2 x 2 latents."""
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)

    def shrunk(self) -> "Case":
        """Return the same model with one layer, two heads and few tokens, for trying out."""
        config = {**self.config, "num_layers": 1, "num_attention_heads": 2}
        for name in ("num_single_layers", "num_refiner_layers"):
            if name in config:
                config[name] = 1
        if "ffn_dim" in config:
            config["ffn_dim"] = 64
        for name in ("text_dim", "text_embed_dim", "joint_attention_dim"):
            if name in config:
                config[name] = 32
        frames = 9 if self.frames > 1 else 1
        return replace(
            self,
            name=f"{self.name}-shrunk",
            config=config,
            frames=frames,
            height=64,
            width=96,
            text_tokens=16 if self.kind != "CogVideoXTransformer3DModel" else 226,
        )

    def build(self, device: str, dtype: torch.dtype) -> torch.nn.Module:
        """Return the denoiser with random weights, made in its dtype where it will run."""
        import diffusers

        diffusers.utils.logging.set_verbosity_error()

        with _default_dtype(dtype), torch.device(device):
            torch.manual_seed(0)
            model = getattr(diffusers, self.kind)(**self.config)
        # defaults are made for training from nothing; some of them are zeros, which hide errors
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _noise(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def wan_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": _noise((1, 16, *case.latent), device, dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(
            (1, case.text_tokens, case.config.get("text_dim", 4096)), device, dtype
        ),
    }


def hunyuan_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    width = case.config.get("text_embed_dim", 4096)
    return {
        "hidden_states": _noise((1, 16, *case.latent), device, dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise((1, case.text_tokens, width), device, dtype),
        "encoder_attention_mask": torch.ones(1, case.text_tokens, device=device, dtype=torch.bool),
        "pooled_projections": _noise((1, 768), device, dtype),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }


def cogvideox_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = case.latent
    rotary = get_3d_rotary_pos_embed(
        embed_dim=case.config.get("attention_head_dim", 64),
        crops_coords=((0, 0), (height // 2, width // 2)),
        grid_size=(height // 2, width // 2),
        temporal_size=frames,
        device=torch.device(device),
    )
    return {
        "hidden_states": _noise((1, frames, 16, height, width), device, dtype),
        "encoder_hidden_states": _noise(
            (1, case.text_tokens, case.config.get("text_embed_dim", 4096)), device, dtype
        ),
        "timestep": torch.tensor([500], device=device),
        "image_rotary_emb": rotary,
    }


def flux_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    _, height, width = case.latent
    rows, columns = height // 2, width // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    joint = case.config.get("joint_attention_dim", 4096)
    return {
        "hidden_states": _noise((1, rows * columns, 64), device, dtype),
        "encoder_hidden_states": _noise((1, case.text_tokens, joint), device, dtype),
        "pooled_projections": _noise((1, 768), device, dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "img_ids": ids.reshape(-1, 3).to(device=device, dtype=dtype),
        "txt_ids": torch.zeros(case.text_tokens, 3, device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device, dtype=dtype),
    }


WAN_1B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "num_layers": 30,
    "ffn_dim": 8960,
    "text_dim": 4096,
}
WAN_14B = {**WAN_1B, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
HUNYUAN = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "text_embed_dim": 4096,
    "guidance_embeds": True,
}
COGVIDEOX_5B = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "num_layers": 42,
    "text_embed_dim": 4096,
    "use_rotary_positional_embeddings": True,
}
FLUX_DEV = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 19,
    "num_single_layers": 38,
    "joint_attention_dim": 4096,
    "guidance_embeds": True,
}

WAN, FLUX = "WanTransformer3DModel", "FluxTransformer2DModel"
RELEASED: tuple[Case, ...] = (
    Case("wan-1.3b-480p", WAN, WAN_1B, 81, 480, 832, wan_inputs),
    Case("flux-1024", FLUX, FLUX_DEV, 1, 1024, 1024, flux_inputs, IMAGE_METHODS),
    Case("flux-2048", FLUX, FLUX_DEV, 1, 2048, 2048, flux_inputs, IMAGE_METHODS),
    Case(
        "cogvideox-5b-480p",
        "CogVideoXTransformer3DModel",
        COGVIDEOX_5B,
        49,
        480,
        720,
        cogvideox_inputs,
        text_tokens=226,
    ),
    Case("wan-1.3b-720p", WAN, WAN_1B, 81, 720, 1280, wan_inputs),
    Case("wan-14b-480p", WAN, WAN_14B, 81, 480, 832, wan_inputs),
    Case("flux-4096", FLUX, FLUX_DEV, 1, 4096, 4096, flux_inputs, IMAGE_METHODS),
    Case("wan-14b-720p", WAN, WAN_14B, 81, 720, 1280, wan_inputs),
    Case(
        "hunyuan-video-720p",
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        129,
        720,
        1280,
        hunyuan_inputs,
        text_tokens=256,
    ),
)
# One Wan block at a size a laptop can time: 5 x 24 x 40 tokens, two heads.
CPU_BLOCK = Case(
    "wan-block-cpu",
    WAN,
    {**WAN_1B, "num_attention_heads": 2, "num_layers": 1, "ffn_dim": 1024, "text_dim": 256},
    17,
    384,
    640,
    wan_inputs,
    text_tokens=64,
    notes="one block with random weights, two heads, 4,800 tokens",
)
