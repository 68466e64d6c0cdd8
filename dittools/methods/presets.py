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
_EAR = "SVG-EAR configs (arXiv:2603.08982), "
_SPARSE_PR = "SparsePR adapters (arXiv:2608.18484), "
_SVOO = "SVOO scripts (arXiv:2603.18636), "

# published combinations of one method's parts: name -> method, what differs from its defaults
COMBINATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "svg_ear": (
        "clustered",
        {"mass": 0.9, "least_kept": 0.1, "least_budget": 0.2, "probes": 0},
    ),
    "sparse_pr": (
        "clustered",
        {
            "partition": "response",
            "density": 0.22,
            "skipped": "drop",
            "probe_choice": "groups",
            "gated": False,
            "learn": "output",
            "ridge": 0.1 / 64,  # of 64 rows
            "rank": 16,
            "first_rounds": 25,
            "first_sample": 0,
        },
    ),
    "svoo": (
        "clustered",
        {
            "partition": "profile",
            "q_clusters": 256,
            "k_clusters": 1024,
            "mass": 0.9,
            "score": "mass",
            "skipped": "drop",
            "least_kept": 0.1,
            "probes": 0,
            "first_rounds": 2,
            "first_sample": 0,
        },
    ),
    "cluster_attention": (
        "clustered",
        {
            "partition": "split",
            "least_queries": 64,
            "least_keys": 128,
            "score": "mass",
            "probes": 0,
            "key_block": 64,
        },
    ),
}

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
    ("svg_ear", "wan"): Published({}, 0.1, 1, _EAR + "Wan, 3 % of the layers dense"),
    ("svg_ear", "wan22"): Published({}, 0.1, 1, _EAR + "Wan2.2, 3 % of the layers dense"),
    ("sparse_pr", "hunyuan_video"): Published({}, 0.1, 1, _SPARSE_PR + "HunyuanVideo 720p"),
    ("sparse_pr", "wan22"): Published(
        {"score": "mass", "first_rounds": 50}, 0.2, 1, _SPARSE_PR + "Wan2.2-I2V-A14B 720p"
    ),
    ("sparse_pr", "cosmos"): Published({"every": 4}, 2 / 35, 1, _SPARSE_PR + "Cosmos-Predict2.5"),
    ("svoo", "wan"): Published(
        {"least_kept": 0.15, "every": 40, "settle": 12 / 50},
        0.2,
        1,
        _SVOO + "Wan2.1 T2V 14B, the lower bound of its floors",
    ),
    ("svoo", "wan22"): Published(
        {"least_kept": 0.2, "every": 40, "settle": 10 / 40},
        0.2,
        1,
        _SVOO + "Wan2.2 A14B, the lower bound of its floors",
    ),
    ("svoo", "hunyuan_video"): Published(
        {"mass": 0.88, "least_kept": 0.05, "every": 50, "settle": 7 / 50},
        0.1,
        1,
        _SVOO + "HunyuanVideo, the lower bound of its floors",
    ),
    ("cluster_attention", "wan"): Published(
        {}, 0.2, 1, "ClusterAttention (arXiv:2608.26965), Wan2.1-14B; dense steps as in SVOO"
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
