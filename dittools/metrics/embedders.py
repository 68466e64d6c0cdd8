"""Image networks loaded from a folder the user names, never downloaded: DINO, CLIP, LPIPS.

Preprocessing is plain torch, since the packaged image processors need torchvision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dittools.errors import InputError
from dittools.metrics.clips import Pixels
from dittools.reading import MOST_TENSORS, check_file, read_json

DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
CLIP_TYPES = ("clip", "clip_vision_model")
MEANS = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
BATCH = 16  # frames
LPIPS_LEAST_SIDE = 31  # pixels; AlexNet's second pool has nothing to choose from below


@dataclass(frozen=True)
class Embedder:
    """A network that turns frames into vectors.

    Attributes:
        family: "dino" or "clip".
        name: model type and folder name, for tables.
        forward: normalised images [N, 3, H, W] -> [N, D].
        antialias: whether frames are made smaller as Pillow does; VBench does not.
        size: hidden width, patch side and layers.
    """

    family: str
    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    antialias: bool = False
    size: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float64]:
        """Return unit vectors [frames, D] of uint8 frames [F, H, W, 3]."""
        rows = []
        for start in range(0, len(pixels), BATCH):
            images = prepared(pixels[start : start + BATCH], self.family, self.antialias)
            with torch.no_grad():
                rows.append(F.normalize(self.forward(images).float(), dim=-1))
        return torch.cat(rows).double().numpy()


def load_embedder(folder: Path, family: str, *, antialias: bool = False) -> Embedder:
    """Return a DINO or CLIP image network from a transformers folder.

    DINO gives the class token after the last norm, CLIP the projected image feature.

    Args:
        folder: config.json and weights, as `save_pretrained` writes them.
        family: "dino" or "clip".
        antialias: as in `Embedder`.
    Raises:
        InputError: no such folder, another kind of model, or weights missing from it.
    """
    kind = _model_type(folder, family)
    import transformers

    try:
        if family == "clip":
            loaded, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        else:
            keywords: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
            loaded, info = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **keywords
            )
    except Exception as error:  # damaged files fail in many ways, all one message
        raise InputError(
            f"cannot load {family} weights from {folder}",
            expected="config.json and model.safetensors of one model",
            got=" ".join(str(error).split())[:200],
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"the weights in {folder} are not those of its config",
            expected=f"a tensor named {missing[0]}",
            got=f"{len(missing)} tensors missing",
        )
    model = loaded.eval()
    if kind == "vit":
        model.embeddings.interpolate_pos_encoding = partial(_dino_positions, model.embeddings)

    def forward(images: torch.Tensor) -> torch.Tensor:
        extra = {"interpolate_pos_encoding": True} if kind == "vit" else {}
        output = model(pixel_values=images, **extra)
        vectors = output.image_embeds if family == "clip" else output.last_hidden_state[:, 0]
        assert isinstance(vectors, torch.Tensor)
        return vectors

    config = model.config
    size = (config.hidden_size, config.patch_size, config.num_hidden_layers)
    return Embedder(family, f"{kind}, {folder.name}", forward, antialias, size)


def _dino_positions(embeddings: Any, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return position vectors [1, 1 + patches, D] for any size, as DINO's own code has them.

    It enlarges the trained raster by factors to which a tenth of a patch was added; transformers
    enlarges to the size, which moves the unit vectors of wide frames by some 3e-4.
    """
    known: torch.Tensor = embeddings.position_embeddings
    count = known.shape[1] - 1
    if tokens.shape[1] - 1 == count and height == width:
        return known
    side = math.isqrt(count)
    raster = known[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    rows, columns = (int(pixels // embeddings.patch_size) for pixels in (height, width))
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    raster = F.interpolate(raster, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat((known[:, :1], raster.flatten(2).transpose(1, 2)), dim=1)


def load_aesthetic_head(folder: Path, width: int) -> Callable[[npt.NDArray[Any]], float]:
    """Return a function from CLIP vectors [F, width] to the mean aesthetic score / 10.

    Source: the linear predictor of LAION on CLIP ViT-L/14 vectors, as VBench uses it.

    Raises:
        InputError: no file sa_0_4_vit_l_14_linear.pth in the folder, or not a linear layer.
    """
    path = folder / "sa_0_4_vit_l_14_linear.pth"
    state = _state(path, "the linear aesthetic predictor")
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or bias is None or tuple(weight.shape) != (1, width):
        raise InputError(
            f"{path} is not a predictor for these CLIP vectors",
            expected=f"weight [1, {width}] and bias [1]",
            got=", ".join(f"{name} {tuple(t.shape)}" for name, t in state.items())[:200],
        )
    row, offset = weight[0].double().numpy(), float(bias.reshape(-1)[0])
    return lambda vectors: float(np.mean(vectors @ row + offset) / 10)


def load_lpips(folder: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return LPIPS (AlexNet) of image pairs [N, 3, H, W] in 0..1, one distance per pair.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1. The linear weights come from
    `alex.pth` in the folder, or from torchmetrics, which ships them.

    Args:
        folder: holds a file whose name begins with "alexnet" (torchvision's weights).
    Raises:
        InputError: the file is absent or is no AlexNet; also raised for images below 31 pixels.
    """
    found = sorted([*_folder(folder).glob("alexnet*.pth"), *folder.glob("alexnet*.safetensors")])
    if not found:
        raise InputError(f"no LPIPS weights in {folder}", expected="a file alexnet*.pth")
    backbone = _state(found[0], "AlexNet")
    layers = []
    for index, (stride, padding) in _ALEXNET.items():
        weight, bias = (backbone.get(f"features.{index}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None:
            raise InputError(f"{found[0]} is no AlexNet", expected=f"features.{index}.weight")
        layers.append((weight, bias, stride, padding))
    linear = _lpips_linear(folder)

    def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if min(first.shape[2:]) < LPIPS_LEAST_SIDE:
            raise InputError(
                "frames are too small for LPIPS",
                expected=f"sides of {LPIPS_LEAST_SIDE} pixels or more",
                got=f"{first.shape[3]} x {first.shape[2]}",
            )
        total = torch.zeros(len(first))
        with torch.no_grad():
            pairs = zip(_alexnet(first, layers), _alexnet(second, layers), linear, strict=True)
            for one, two, weight in pairs:
                total += F.conv2d((one - two) ** 2, weight).mean(dim=(1, 2, 3))
        return total

    return distance


# index of each convolution in torchvision's AlexNet -> stride, padding; a 3 x 3 pool with stride 2
# stands before the second and the third
_ALEXNET = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}


def _alexnet(
    images: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor, int, int]]
) -> list[torch.Tensor]:
    """Return the five activations, each with unit channel vectors."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x = (images * 2 - 1 - shift) / scale
    found = []
    for number, (weight, bias, stride, padding) in enumerate(layers):
        if number in (1, 2):
            x = F.max_pool2d(x, 3, 2)
        x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
    return found


def _lpips_linear(folder: Path) -> list[torch.Tensor]:
    path = folder / "alex.pth"
    if not path.exists():
        import torchmetrics

        home = Path(torchmetrics.__file__).parent
        path = home / "functional" / "image" / "lpips_models" / "alex.pth"
    state = _state(path, "the linear layers of LPIPS")
    weights = [state.get(f"lin{number}.model.1.weight") for number in range(5)]
    if any(weight is None for weight in weights):
        raise InputError(f"{path} is not LPIPS", expected="lin0.model.1.weight to lin4")
    return [weight for weight in weights if weight is not None]


def prepared(pixels: Pixels, family: str, antialias: bool = False) -> torch.Tensor:
    """Return normalised images [N, 3, H, W]: shorter side 224, for CLIP also cropped to it.

    Args:
        pixels: uint8 [N, H, W, 3].
        family: "dino" or "clip".
        antialias: resize as Pillow does, which is what CLIP's own processor uses and every score
            that was trained with it; False is VBench's way.
    """
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    height, width = images.shape[2:]
    longer = 224 * max(height, width) // min(height, width)
    size = (224, longer) if height <= width else (longer, 224)
    mode = "bicubic" if family == "clip" else "bilinear"
    resize = partial(F.interpolate, mode=mode, align_corners=False, antialias=antialias)
    if antialias:  # Pillow's order, and whole levels after each pass
        for part in ((height, size[1]), size):
            images = resize(images, part).round().clamp(0, 255)
    else:
        images = resize(images, size)
    if family == "clip":
        over = (size[0] - 224, size[1] - 224)  # an odd one: CLIP's processor leaves more behind it
        top, left = (n // 2 if antialias else round(n / 2) for n in over)
        images = images[:, :, top : top + 224, left : left + 224]
    mean, deviation = (torch.tensor(part).view(1, 3, 1, 1) for part in MEANS[family])
    return (images / 255 - mean) / deviation


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError("no such weights folder", got=str(folder))
    return folder


def _model_type(folder: Path, family: str) -> str:
    wanted = CLIP_TYPES if family == "clip" else DINO_TYPES
    path = _folder(folder) / "config.json"
    try:
        kind = read_json(path).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder} holds no {family} model", expected="a readable config.json"
        ) from error
    if kind not in wanted:
        raise InputError(
            f"{folder} holds another model",
            expected=f"model_type {' or '.join(wanted)} in config.json",
            got=repr(kind),
        )
    return str(kind)


def _state(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Return a state dict; never unpickles code."""
    try:
        check_file(path, MOST_TENSORS)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways, all one message
        raise InputError(
            f"cannot read {what} from {path}", got=" ".join(str(error).split())[:160]
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no {what}", expected="a state dict of tensors")
    return state
