"""The embedded demo model: a stock WanPipeline trained from nothing on drawn, captioned clips."""

from pathlib import Path
from typing import Any

DEFAULT_PROMPT = "a red circle moving left over a blue striped background"
DEFAULT_HEIGHT = 96  # pixels, 12 tokens
DEFAULT_WIDTH = 96
DEFAULT_FRAMES = 12
DEFAULT_STEPS = 12
DEFAULT_GUIDANCE = 4.0
DEMO_DEFAULTS: dict[str, Any] = {
    "prompt": DEFAULT_PROMPT,
    "height": DEFAULT_HEIGHT,
    "width": DEFAULT_WIDTH,
    "frames": DEFAULT_FRAMES,
    "steps": DEFAULT_STEPS,
    "guidance": DEFAULT_GUIDANCE,
}
PROMPTS = (
    DEFAULT_PROMPT,
    "a yellow square moving up over a grey background",
    "a green triangle moving right over a red striped background",
    "a blue circle moving down",
    "a red circle",
)
WEIGHTS = Path(__file__).parent / "weights"


def load_demo(folder: Path = WEIGHTS) -> Any:
    """Return the demo model as a stock WanPipeline in fp32, in eval mode; nothing is downloaded.

    It was trained at the default size only: 12 frames of 96 x 96 pixels, 1,728 tokens.
    """
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    return pipe


def frames_argument(frames: int) -> int:
    """Return the `num_frames` to call the pipeline with to get this many frames.

    The demo codec keeps every frame, and WanPipeline adds one frame at that ratio.
    """
    return frames - 1
