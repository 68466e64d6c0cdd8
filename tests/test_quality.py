"""Quality numbers against independent arithmetic, falling where they must, never made up."""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dittools.errors import InputError
from dittools.metrics import embedders, proxies, vbench
from dittools.metrics.clips import Clip, find_clips, read_clip, same_shape
from dittools.metrics.fidelity import compare, worst_second
from dittools.pipelines.output import write_clip

Pixels = np.ndarray


def scene(frames: int = 9, side: int = 96, speed: float = 4.0, seed: int = 0) -> Pixels:
    """A textured square over a smooth background, moving right by `speed` pixels a frame."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    ground = np.stack([0.3 + 0.3 * x, 0.5 * y, 0.6 - 0.3 * x], -1)
    size = side // 4
    patch = cv2.resize(rng.random((6, 6, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
    clip = np.repeat(ground[None], frames, 0)
    for frame in range(frames):
        left = 4 + round(speed * frame) % (side - size - 4)
        clip[frame, size : 2 * size, left : left + size] = np.clip(patch, 0, 1)
    return (clip * 255).astype(np.uint8)


def noisy(pixels: Pixels, sigma: float, seed: int = 1) -> Pixels:
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def flickering(pixels: Pixels, step: int) -> Pixels:
    bright = pixels.astype(np.int16)
    bright[1::2] += step
    return np.clip(bright, 0, 255).astype(np.uint8)


def clip(pixels: Pixels, name: str = "clip.mp4", fps: float = 8.0) -> Clip:
    return Clip(Path(name), pixels, fps)


def values(pixels: Pixels) -> dict[str, float | None]:
    return {name: d.value for name, d in vbench.measure_clips([clip(pixels)]).items()}


# -- fidelity


def as_float(pixels: Pixels) -> np.ndarray:
    return pixels.astype(np.float32) / 255


def test_psnr_is_ten_log_of_the_mean_square() -> None:
    first = as_float(scene())
    second = first.copy()
    second[2] = np.clip(second[2] + 0.1, 0, 1)
    found = compare(first, second)
    wanted = -10 * np.log10(np.mean((first[2].astype(float) - second[2]) ** 2))
    assert found.frame_psnr_db[2] == pytest.approx(wanted, abs=1e-6)
    assert found.frame_psnr_db[0] == 120
    assert found.psnr_db == pytest.approx(wanted + 10 * np.log10(len(first)), abs=1e-6)


def test_ssim_per_frame_equals_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    first, second = as_float(scene()), as_float(noisy(scene(), 12))
    found = compare(first, second)
    border = ((5, 5), (5, 5), (0, 0))  # scikit-image leaves out what torchmetrics mirrors
    wanted = [
        structural_similarity(
            np.pad(a, border, "reflect"),
            np.pad(b, border, "reflect"),
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(first.astype(float), second.astype(float), strict=True)
    ]
    assert found.frame_ssim == pytest.approx(wanted, abs=1e-6)
    assert found.ssim == pytest.approx(np.mean(found.frame_ssim))


def test_long_clips_in_single_precision_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = as_float(scene()), as_float(noisy(scene(), 12))
    exact = compare(first, second)
    monkeypatch.setattr("dittools.metrics.fidelity.EXACT_PIXELS", 0)
    assert compare(first, second).frame_ssim == pytest.approx(exact.frame_ssim, abs=1e-4)
    assert compare(first, second).frame_ssim != exact.frame_ssim
    assert compare(first, first).ssim == pytest.approx(1, abs=1e-4)


def ms_ssim_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2003 with scipy: contrast-structure at four scales, SSIM at the fifth."""
    from scipy.ndimage import gaussian_filter

    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    result = 1.0
    for level, weight in enumerate(weights):
        blur = [
            np.stack([gaussian_filter(x[..., c], 1.5, truncate=5 / 1.5) for c in range(3)], -1)
            for x in (first, second, first**2, second**2, first * second)
        ]
        inner = (slice(5, -5), slice(5, -5))
        m1, m2, s1, s2, s12 = (x[inner] for x in blur)
        s1, s2, s12 = s1 - m1**2, s2 - m2**2, s12 - m1 * m2
        structure = (2 * s12 + 0.03**2) / (s1 + s2 + 0.03**2)
        light = (2 * m1 * m2 + 0.01**2) / (m1**2 + m2**2 + 0.01**2)
        result *= np.mean(structure * light if level == 4 else structure) ** weight
        first, second = (
            x.reshape(x.shape[0] // 2, 2, -1, 2, 3).mean((1, 3)) for x in (first, second)
        )
    return float(result)


def test_ms_ssim_equals_its_definition_where_it_fits() -> None:
    first, second = (as_float(x[:2]) for x in (scene(side=192), noisy(scene(side=192), 25)))
    found = compare(first, second).ms_ssim
    wanted = np.mean(
        [
            ms_ssim_by_hand(a.astype(float), b.astype(float))
            for a, b in zip(first, second, strict=True)
        ]
    )
    assert found == pytest.approx(wanted, abs=2e-3)
    for cut in (np.s_[:, :175], np.s_[:, :, :161]):  # the fifth scale would be below the window
        assert compare(first[cut], second[cut]).ms_ssim is None
    assert 0 < compare(first[:, :176, :177], second[:, :176, :177]).ms_ssim < 1


def test_fidelity_falls_with_noise() -> None:
    base = as_float(scene(side=176, frames=1))
    found = [compare(base, as_float(noisy(scene(side=176, frames=1), s))) for s in (2, 8, 20, 50)]
    for measure in ("psnr_db", "ssim", "ms_ssim"):
        row = [getattr(f, measure) for f in found]
        assert row == sorted(row, reverse=True), measure
        assert len(set(row)) == len(row)


def test_worst_second_is_the_lowest_run_of_frames() -> None:
    curve = [40.0] * 20
    curve[9:13] = [20.0, 10.0, 10.0, 20.0]
    assert worst_second(curve, fps=4) == (9, 12)
    assert worst_second([30.0, 20.0], fps=24) == (0, 1)


# -- the seven dimensions


def test_flickering_is_vbenchs_formula_on_the_decoded_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", as_float(noisy(scene(), 20)), 8)
    video, frames = cv2.VideoCapture(str(path)), []
    while (got := video.read())[0]:
        frames.append(got[1].astype(np.float64))
    wanted = np.mean([(255 - np.abs(b - a).mean()) / 255 for a, b in pairwise(frames)])
    found = vbench.measure_clips([read_clip(path)])["temporal_flickering"]
    assert found.value == pytest.approx(wanted, abs=1e-12)
    assert found.kind == "vbench"


def test_a_frozen_clip_is_steady_in_every_temporal_dimension() -> None:
    found = values(np.repeat(scene()[:1], 9, 0))
    assert found["temporal_flickering"] == 1
    assert found["motion_smoothness"] == 1
    assert found["dynamic_degree"] == 0
    assert found["subject_consistency"] == pytest.approx(1)
    assert found["background_consistency"] == pytest.approx(1)


def test_flicker_is_seen_and_grows() -> None:
    rows = [values(flickering(scene(speed=0) // 2, step)) for step in (0, 8, 24, 60)]
    for name in (
        "temporal_flickering",
        "subject_consistency",
        "background_consistency",
    ):
        row = [values[name] for values in rows]
        assert row == sorted(row, reverse=True), (name, row)
        assert row[0] - row[-1] > 0.005, (name, row)
    alternating = [values["temporal_flickering"] for values in rows]
    assert alternating[1] == pytest.approx(1 - 8 / 255, abs=1e-9)


def test_motion_smoothness_prefers_even_motion_to_stutter() -> None:
    smooth = scene(frames=13, speed=3)
    stutter = smooth[[0, 0, 2, 2, 5, 5, 5, 8, 8, 8, 11, 11, 12]]
    jumping = smooth[[0, 9, 1, 11, 2, 8, 3, 12, 4, 10, 5, 7, 6]]
    found = [vbench.motion_smoothness(x) for x in (smooth, stutter, jumping)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99 > found[2]


def test_middle_frame_is_close_to_the_true_one() -> None:
    first, true, last = scene(frames=3, speed=3)
    built = proxies.middle_frame(first, last).astype(int)
    blend = ((first.astype(int) + last) / 2).round()
    assert np.abs(built - true).mean() < 0.5 * np.abs(blend - true).mean()


def test_flow_of_a_shifted_picture_is_the_shift() -> None:
    rng = np.random.default_rng(0)
    wide = cv2.GaussianBlur(rng.integers(0, 256, (96, 120, 3), np.uint8), (0, 0), 2)
    found = proxies.flow(wide[:, 5:101], wide[:, 0:96])[16:-16, 16:-16]
    assert np.median(found[..., 0]) == pytest.approx(5, abs=0.2)
    assert np.median(found[..., 1]) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize(("speed", "dynamic"), [(0.0, 0.0), (0.5, 0.0), (6.0, 1.0)])
def test_dynamic_degree_needs_fast_motion(speed: float, dynamic: float) -> None:
    assert values(scene(speed=speed))["dynamic_degree"] == dynamic


def test_dynamic_degree_looks_at_eight_frames_a_second() -> None:
    slow = scene(frames=33, speed=1)  # 1 pixel a frame: 3 pixels in an eighth of a second at 24
    assert not vbench.dynamic_degree(slow, fps=8)
    assert vbench.dynamic_degree(slow, fps=24)


def test_consistency_is_vbenchs_mean_of_previous_and_first() -> None:
    features = np.array([[1.0, 0], [0, 1], [1, 1], [-1, 0]])
    half = 1 / np.sqrt(2)
    pairs = [(0, 0), (half, half), (0, 0)]  # negative similarities count as zero
    assert vbench.consistency(features) == pytest.approx(np.mean([sum(p) / 2 for p in pairs]))


def test_subject_moves_freely_but_not_the_background() -> None:
    moving, swapped = scene(speed=6), scene(speed=6)
    swapped[5:] = 255 - swapped[5:]
    found, changed = values(moving), values(swapped)
    assert found["subject_consistency"] > 0.98
    assert changed["subject_consistency"] < found["subject_consistency"] - 0.1
    assert changed["background_consistency"] < found["background_consistency"] - 0.05


def blocky(pixels: Pixels) -> Pixels:
    f, h, w, _ = pixels.shape
    cells = pixels.reshape(f, h // 8, 8, w // 8, 8, 3).mean((2, 4))
    return cells.repeat(8, 1).repeat(8, 2).astype(np.uint8)


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("sharpness", lambda x, s: np.stack([cv2.GaussianBlur(f, (0, 0), s) for f in x])),
        ("cleanness", lambda x, s: noisy(x, 10 * s)),
        ("evenness", lambda x, s: ((1 - s / 4) * x + s / 4 * blocky(x)).astype(np.uint8)),
    ],
)
def test_imaging_parts_fall_with_their_own_damage(
    part: str, damage: Callable[[Pixels, float], Pixels]
) -> None:
    base = np.stack([cv2.GaussianBlur(noisy(f, 60), (0, 0), 1.2) for f in scene(frames=2)])
    row = [
        proxies.imaging(base)[part],
        *(proxies.imaging(damage(base, s))[part] for s in (1, 2, 4)),
    ]
    assert row == sorted(row, reverse=True)
    assert all(0 < v <= 1 for v in row)
    assert row[0] - row[-1] > 0.05


def test_enlarging_a_small_clip_is_not_blockiness() -> None:
    small = noisy(scene(side=48), 20)
    for factor, least, most in ((2, 0.8, 1.0), (4, 0.8, 1.0), (8, 0.0, 0.5)):
        enlarged = small.repeat(factor, 1).repeat(factor, 2)
        assert least <= proxies.imaging(enlarged)["evenness"] <= most, factor


def test_noise_estimate_is_the_noise() -> None:
    grey = np.full((200, 200), 128.0) + np.random.default_rng(0).normal(0, 9, (200, 200))
    assert proxies._noise(grey, cv2) == pytest.approx(9, rel=0.05)


def test_proxies_are_marked_and_aesthetics_is_not_made_up() -> None:
    found = vbench.measure_clips([clip(scene())])
    assert tuple(found) == vbench.DIMENSIONS
    assert {name for name, d in found.items() if d.kind == "vbench"} == {"temporal_flickering"}
    assert found["aesthetic_quality"].value is None
    assert found["aesthetic_quality"].kind == "not measured"
    assert "folder" in found["aesthetic_quality"].how
    json.dumps({name: d.to_dict() for name, d in found.items()}, allow_nan=False)


def test_one_frame_has_no_temporal_dimension() -> None:
    found = vbench.measure_clips([clip(scene(frames=1))])
    for name in vbench.DIMENSIONS[:5]:
        assert found[name].value is None, name
        assert found[name].kind == "not measured"
    assert found["imaging_quality"].value is not None


def test_consistencies_average_over_frames_and_the_rest_over_clips() -> None:
    long, short = scene(frames=17, speed=0), flickering(scene(frames=3), 60)
    found = vbench.measure_clips([clip(long, "a.mp4"), clip(short, "b.mp4")])
    each = {n: (found[n].clips["a.mp4"], found[n].clips["b.mp4"]) for n in vbench.DIMENSIONS}
    a, b = each["subject_consistency"]
    assert found["subject_consistency"].value == pytest.approx((16 * a + 2 * b) / 18)
    a, b = each["temporal_flickering"]
    assert found["temporal_flickering"].value == pytest.approx((a + b) / 2)


# -- networks from a folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "dino"
    small = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=16)
    small.intermediate_size = 64
    ViTModel(small, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "clip"
    side = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    side["intermediate_size"] = 64
    config = CLIPConfig(
        vision_config={**side, "patch_size": 32, "image_size": 224, "projection_dim": 16},
        text_config={**side, "vocab_size": 50},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    torch.save(
        {"weight": torch.ones(1, 16), "bias": torch.tensor([5.0])},
        folder / "sa_0_4_vit_l_14_linear.pth",
    )
    return folder


def test_named_folders_turn_proxies_into_vbenchs_definition(
    dino: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With VBench's networks; of another size they are stand-ins like any other, and say so."""
    weights = vbench.Weights(dino=dino, clip=clip_folder, aesthetic=clip_folder)
    names = ("subject_consistency", "background_consistency", "aesthetic_quality")
    wanted = ("vit, dino (VBench: DINO ViT-B/16)", "ViT-B/32)", "ViT-L/14) and its linear head")
    small = vbench.measure_clips([clip(scene(frames=3))], weights)
    for name, words in zip(names, wanted, strict=True):
        assert small[name].kind == "proxy"
        assert small[name].how.endswith(words)
    sizes = {"dino": (32, 16, 2), "clip": (32, 32, 1), "aesthetic": (32, 32, 1)}
    known = {key: (row[0], sizes[key], row[2]) for key, row in vbench.NETWORKS.items()}
    monkeypatch.setattr(vbench, "NETWORKS", known)
    found = vbench.measure_clips([clip(scene(frames=3))], weights)
    for name in names:
        assert found[name].kind == "vbench", name
        assert "VBench" not in found[name].how
        assert found[name].value == small[name].value
    assert 0 < found["subject_consistency"].value <= 1
    vectors = embedders.load_embedder(clip_folder, "clip")(scene(frames=3))
    assert found["aesthetic_quality"].value == pytest.approx((vectors.sum(1).mean() + 5) / 10)


def test_clip_vectors_are_transformers_own(clip_folder: Path) -> None:
    from transformers import CLIPModel

    frames = scene(frames=2, side=224)
    mean, deviation = (np.array(x) for x in embedders.MEANS["clip"])
    images = torch.from_numpy((frames / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=images).pooler_output
        wanted = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
    found = embedders.load_embedder(clip_folder, "clip")(frames)
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "longer"),
    [(110, 110, 224), (110, 220, 448), (95, 285, 672), (480, 832, 388)],
)
def test_frames_get_torchvisions_size(height: int, width: int, longer: int) -> None:
    """224 x longer / shorter, cut off: 224 / shorter first would lose a pixel of whole results."""
    wide = np.zeros((1, height, width, 3), np.uint8)
    assert embedders.prepared(wide, "dino").shape[2:] == (224, longer)
    assert embedders.prepared(wide.swapaxes(1, 2), "dino").shape[2:] == (longer, 224)
    assert embedders.prepared(wide, "clip").shape[2:] == (224, 224)


@pytest.mark.parametrize("size", [(480, 832), (97, 301), (333, 110), (224, 224)])
def test_scores_trained_on_pillows_resize_get_it(size: tuple[int, int]) -> None:
    """CLIP's own processor, to one level of 255; VBench's resize of noise is far from it."""
    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    height, width = size
    longer = 224 * max(size) // min(size)
    new = (longer, 224) if height <= width else (224, longer)  # Pillow: width first
    image = Image.fromarray(frame).resize(new, Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in new)
    cut = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float64)
    mean, deviation = (np.array(x) for x in embedders.MEANS["clip"])

    def apart(antialias: bool) -> float:
        found = embedders.prepared(frame[None], "clip", antialias)[0].permute(1, 2, 0).double()
        return float(np.abs((found.numpy() * deviation + mean) * 255 - cut).max())

    assert apart(True) < 1.01
    assert size == (224, 224) or apart(False) > 30


def test_dino_positions_of_wide_frames_are_its_own(dino: Path) -> None:
    """Its factors have a tenth of a patch added, so places are sampled that much closer."""
    from transformers import ViTModel

    rule = embedders._dino_positions
    model = ViTModel.from_pretrained(dino, add_pooling_layer=False).embeddings
    model.position_embeddings.data.normal_()
    found = rule(model, torch.zeros(1, 1 + 14 * 24, 32), 224, 388)
    down, right = (((2 * torch.arange(n) + 1) / (n + 0.1) - 1) for n in (14, 24))
    raster = model.position_embeddings[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    grid = torch.stack((right.expand(14, 24), down[:, None].expand(14, 24)), -1)[None]
    sampled = torch.nn.functional.grid_sample(
        raster, grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    wanted = sampled.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, 1:], wanted, atol=1e-4, rtol=0)
    assert torch.equal(found[:, 0], model.position_embeddings[:, 0])
    square = rule(model, torch.zeros(1, 197, 32), 224, 224)
    assert torch.equal(square, model.position_embeddings)
    loaded = embedders.load_embedder(dino, "dino")
    frames = np.random.default_rng(0).integers(0, 256, (1, 224, 388, 3)).astype(np.uint8)
    images = embedders.prepared(frames, "dino")
    own = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval()
    with torch.no_grad():
        stock = own(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    stock = torch.nn.functional.normalize(stock, dim=-1).double().numpy()
    assert 1e-7 < np.abs(loaded(frames) - stock).max() < 0.05


def test_lpips_is_zero_for_equals_and_grows_with_noise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    state = {}
    for index, (out, into, side) in shapes.items():
        state[f"features.{index}.weight"] = torch.randn(out, into, side, side) / side / into**0.5
        state[f"features.{index}.bias"] = torch.zeros(out)
    torch.save(state, tmp_path / "alexnet-random.pth")
    distance = embedders.load_lpips(tmp_path)
    images = torch.from_numpy(scene(frames=2)).permute(0, 3, 1, 2).float() / 255
    assert distance(images, images).tolist() == [0, 0]
    noise = torch.randn_like(images)
    row = [float(distance(images, (images + s * noise)).mean()) for s in (0.02, 0.1, 0.4)]
    assert 0 < row[0] < row[1] < row[2]
    assert float(distance(images[:1, :, :31], noise[:1, :, :31])) > 0
    with pytest.raises(InputError, match=r"too small for LPIPS; .*31 pixels"):
        distance(images[:, :, :30], noise[:, :, :30])


def test_folders_with_wrong_files_are_named(dino: Path, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such weights folder"):
        embedders.load_embedder(tmp_path / "none", "dino")
    with pytest.raises(InputError, match=r"config\.json"):
        embedders.load_embedder(tmp_path, "dino")
    with pytest.raises(InputError, match="model_type clip"):
        embedders.load_embedder(dino, "clip")
    (tmp_path / "config.json").write_text((dino / "config.json").read_text())
    with pytest.raises(InputError, match="cannot load dino"):
        embedders.load_embedder(tmp_path, "dino")
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot load dino"):
        embedders.load_embedder(tmp_path, "dino")
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="tensors missing"):
        embedders.load_embedder(tmp_path, "dino")
    with pytest.raises(InputError, match="alexnet"):
        embedders.load_lpips(tmp_path)
    (tmp_path / "alexnet.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="cannot read AlexNet"):
        embedders.load_lpips(tmp_path)
    clip_folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (clip_folder / "sa_0_4_vit_l_14_linear.pth").unlink()
    with pytest.raises(InputError, match="cannot read the linear aesthetic predictor"):
        vbench.Quality(vbench.Weights(aesthetic=clip_folder))
    torch.save({"weight": torch.ones(1, 9)}, clip_folder / "sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(InputError, match=r"expected weight \[1, 16\]"):
        vbench.Quality(vbench.Weights(aesthetic=clip_folder))


# -- bad input


def test_unreadable_empty_and_missing_clips_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_clips(tmp_path / "none")
    with pytest.raises(InputError, match="holds no clip"):
        find_clips(tmp_path)
    (tmp_path / ".half-written.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="holds no clip"):
        find_clips(tmp_path)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"this is no video")
    with pytest.raises(InputError, match=r"cannot read .*bad\.mp4"):
        read_clip(bad)
    image = tmp_path / "bad.png"
    image.write_bytes(b"this is no image")
    with pytest.raises(InputError, match=r"cannot read .*bad\.png"):
        read_clip(image)


def test_a_video_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", as_float(noisy(scene(frames=24), 40)), 8)
    assert len(read_clip(path).pixels) == 24
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="breaks off"):
        read_clip(path)


def test_clips_that_differ_are_named() -> None:
    with pytest.raises(
        InputError, match=r"b\.mp4 and a\.mp4 differ.*9 frames of 96 x 96.*8 frames"
    ):
        same_shape([clip(scene(), "a.mp4"), clip(scene()[:8], "b.mp4")])


def test_nan_frames_are_named() -> None:
    good, bad = as_float(scene()), as_float(scene())
    bad[3, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"second clip holds NaN.*frame 3"):
        compare(good, bad)


def test_tiny_frames_are_refused_not_scored() -> None:
    with pytest.raises(InputError, match="too small for optical flow"):
        vbench.measure_clips([clip(scene(side=96)[:, :12, :12])])


def test_without_opencv_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install 'dittools\[quality\]'"):
        vbench.measure_clips([clip(scene())])
