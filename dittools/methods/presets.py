"""The settings authors publish for their methods, by model family."""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """One published setting.

    Attributes:
        params: what differs from the method's defaults.
        dense_steps: leading dense steps as a share of the authors' run, so that few-step models
            get theirs.
        dense_layers: leading dense layers.
        source: where the numbers come from.
    """

    params: dict[str, Any]
    dense_steps: float
    dense_layers: int
    source: str


DEFAULT_DENSE_STEPS = 0.25  # most authors keep 20 to 30 % of the steps dense
_RADIAL = "radial-attention scripts, "
_VDIT = "arXiv:2506.03065, densities that give its FLOP counts"
_PARO = "arXiv:2506.16054 (with calibrated tables), "
_RECT = "Rectified-SpaAttn scripts, "
_PSA = "Pyramid-Sparse-Attention presets, "
_SVG = "Sparse-VideoGen scripts, "
_GNA = "arXiv:2504.16922, "

PUBLISHED: dict[tuple[str, str], Published] = {
    ("radial", "wan"): Published(
        {"decay": 0.2, "sink": True, "block_size": 128}, 0.24, 1, _RADIAL + "Wan2.1-14B 768x1280x69"
    ),
    ("radial", "wan22"): Published(
        {"decay": 0.8, "sink": True, "block_size": 64},
        0.275,
        1,
        _RADIAL + "Wan2.2-A14B 768x1280x77",
    ),
    ("radial", "hunyuan_video"): Published(
        {"decay": 0.95, "sink": False, "block_size": 128},
        0.24,
        0,
        _RADIAL + "HunyuanVideo 768x1280x117",
    ),
    ("gna", "hunyuan_video"): Published(
        {"window": ("full", 0.8334, 0.5), "stride": (1, 32, 8)},
        0,
        0,
        _GNA + "HunyuanVideo 720p, window 30x40x40 of 30x48x80 at every step",
    ),
    ("gna", "cosmos"): Published(
        {"window": ("full", 0.7273, 0.6), "stride": (1, 8, 16)},
        12 / 35,
        0,
        _GNA + "Cosmos-7B 720p, window 16x32x48 of 16x44x80",
    ),
    ("gna", "flux"): Published(
        {"window": ("full", 0.3125, 0.3125), "stride": (1, 16, 16)},
        9 / 28,
        0,
        _GNA + "FLUX.1-dev 4K, window 80x80 of 256x256",
    ),
    ("sta", "hunyuan_video"): Published(
        {"window": (5, 5, 5), "tile": (6, 8, 8)},
        0,
        0,
        _GNA + "its comparison at 58.3 % sparsity, HunyuanVideo 720p, every step",
    ),
    ("clear", "flux"): Published(
        {"radius": 32, "proportional": True},
        0.25,
        0,
        "Huage001/CLEAR at high resolution with stock weights, for which nothing is published",
    ),
    ("sparse_vdit", "cogvideox15"): Published({"density": 0.265}, 0, 0, _VDIT),
    ("sparse_vdit", "hunyuan_video"): Published({"density": 0.15}, 10 / 50, 0, _VDIT),
    ("sparse_vdit", "wan"): Published({"density": 0.298}, 10 / 50, 0, _VDIT),
    ("paro", "cogvideox"): Published({"density": 0.3}, 0, 0, _PARO + "CogVideoX-5B, 49 frames"),
    ("paro", "wan"): Published({"density": 0.5}, 0, 0, _PARO + "Wan2.1-14B 720p"),
    ("paro", "flux"): Published({"density": 0.5}, 0, 0, _PARO + "FLUX.1-dev at 1024"),
    ("rectified", "hunyuan_video"): Published({"density": 0.2}, 0, 0, _RECT + "HunyuanVideo 720p"),
    ("rectified", "wan"): Published(
        {"density": 0.25, "first_frame": True}, 5 / 50, 2, _RECT + "Wan2.1 T2V 14B 720p"
    ),
    ("rectified", "wan22"): Published(
        {"density": 0.15, "first_frame": True}, 3 / 40, 2, _RECT + "Wan2.2 T2V A14B 720p"
    ),
    ("rectified", "cogvideox15"): Published(
        {"density": 0.15}, 5 / 50, 0, _RECT + "CogVideoX1.5 T2V"
    ),
    ("rectified", "flux"): Published({"density": 0.1}, 0, 0, _RECT + "FLUX.1-dev 4096, all layers"),
    ("psa", "wan"): Published({"ends": (0.4, 0.5, 0.6, 0.8)}, 0.3, 0, _PSA + "Wan2.1 14B"),
    ("psa", "wan22"): Published(
        {"ends": (0.5, 0.6, 0.6, 0.8), "key_block": 32}, 0.3, 0, _PSA + "Wan2.2 A14B"
    ),
    ("psa", "cogvideox15"): Published(
        {"rule": "topk", "ends": (0.1, 0.15, 0.15, 0.35), "key_block": 32},
        0.3,
        0,
        _PSA + "CogVideoX1.5 5B",
    ),
    ("psa", "cogvideox"): Published(
        {"rule": "topk", "ends": (0.1, 0.15, 0.15, 0.35), "curve": "raster"},
        0.3,
        0,
        _PSA + "CogVideoX 5B",
    ),
    ("svg", "wan"): Published({"density": 0.3, "band": "ceil"}, 0.2, 1, _SVG + "Wan2.1"),
    ("svg", "hunyuan_video"): Published(
        {"density": 0.25, "sink": False, "band": "floor"}, 0.1, 1, _SVG + "HunyuanVideo"
    ),
    ("freeswim", "wan"): Published(
        {"native": (30, 52)}, 0, 0, "FreeSwim inference.py, window only, Wan2.1-1.3B 480x832"
    ),
    ("agent", "unet"): Published(
        {"agents": "matched", "late": "tome"},
        0,
        0,
        "Agent-Attention agentsd scripts, Stable Diffusion 1.5, 40 % merged",
    ),
    ("tome", "unet"): Published({}, 0, 0, "tomesd's defaults, Stable Diffusion 1 and 2"),
    ("svg2", "wan"): Published({"q_clusters": 300, "mass": 0.9}, 0.2, 1, _SVG + "Wan2.1 720p"),
    ("svg2", "hunyuan_video"): Published(
        {"q_clusters": 400, "mass": 0.9}, 0.1, 1, _SVG + "HunyuanVideo 720p"
    ),
    ("svg2", "cosmos"): Published({"q_clusters": 400, "mass": 0.9}, 0.3, 1, _SVG + "Cosmos 14B"),
    ("vmoba", "wan"): Published(
        {"top_k": 0.25}, 0.25, 0, "arXiv:2506.23858, untrained Wan2.1-1.3B"
    ),
}

# spellings of a family that mean the same published settings
ALIASES = {
    "wan21": "wan",
    "wan2.1": "wan",
    "wan2.2": "wan22",
    "hunyuan": "hunyuan_video",
    "hunyuanvideo": "hunyuan_video",
    "cogvideox1.5": "cogvideox15",
}
