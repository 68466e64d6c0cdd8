"""The embedded demo model: its world, checker, codec, training code and shipped weights."""

import json
import logging
import socket
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from dittools.metrics.prompt_score import PromptScore, observe, score_clip
from dittools.metrics.scene import (
    BACKGROUND_COLOURS,
    MOTIONS,
    OBJECT_COLOURS,
    SHAPES,
    TEXTURES,
    WORDS,
    Scene,
    caption,
    parse,
    unknown_words,
)
from dittools.pipelines.demo import (
    DEMO_DEFAULTS,
    PROMPTS,
    WEIGHTS,
    codec,
    flow,
    frames_argument,
    load_demo,
    model,
    pack,
    score,
    train,
)
from dittools.pipelines.demo.clips import (
    FRAMES,
    Clip,
    draw,
    held_out_scenes,
    random_clip,
    training_caption,
    training_looks,
)
from dittools.pipelines.demo.vae import build_vae
from dittools.pipelines.generate import Settings, generate

ATTRIBUTES = ("background", "texture", "colour", "shape", "motion")
MIB = 2**20


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], np.ndarray]:
    """52 training looks and 32 held-out scenes, and their clips [N, F, H, W, 3]."""
    rng = Random(9)
    looks = [replace(look, motion=rng.choice(list(MOTIONS))) for look in training_looks()[::2]]
    scenes = looks + held_out_scenes()[::2]
    return scenes, _pixels([random_clip(scene, rng) for scene in scenes])


@pytest.fixture(scope="module")
def fitted() -> codec.Codec:
    return codec.fit()


@pytest.fixture(scope="module")
def demo() -> WanPipeline:
    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pixels(clips: list[Clip]) -> np.ndarray:
    pixels, _ = draw(clips, torch.arange(FRAMES).expand(len(clips), -1))
    return pixels.permute(0, 1, 3, 4, 2).numpy()


def _shares(clips: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    scores = [score_clip(clip, caption(s)) for clip, s in zip(clips, scenes, strict=True)]
    return {
        name: float(np.mean([bool(getattr(score, name)) for score in scores]))
        for name in (*ATTRIBUTES, "all")
    }


# the world and its words


def test_every_caption_reads_back_as_its_scene() -> None:
    kinds = (OBJECT_COLOURS, SHAPES, MOTIONS, BACKGROUND_COLOURS, TEXTURES)
    scenes = [Scene(*values) for values in product(*([*kind, None] for kind in kinds))]
    scenes = [s for s in scenes if (s.background is None) == (s.texture is None)]
    assert len(scenes) == 5 * 4 * 5 * 11
    assert [s for s in scenes if parse(caption(s)) != s] == []


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("A red circle.", Scene("red", "circle")),
        ("circle moving up", Scene(shape="circle", motion="up")),
        (
            "a yellow square over a gray background",
            Scene("yellow", "square", None, "grey", "plain"),
        ),
        ("a striped blue background", Scene(background="blue", texture="striped")),
        (
            "red circle over a red plain background",
            Scene("red", "circle", None, "red", "plain"),
        ),
        ("", Scene()),
    ],
)
def test_short_and_reworded_prompts_are_read(prompt: str, scene: Scene) -> None:
    assert parse(prompt) == scene


def test_unknown_words_are_named_once_and_in_order() -> None:
    assert unknown_words("A purple cat, moving left over a purple sea") == ["purple", "cat", "sea"]
    assert [unknown_words(prompt) for prompt in PROMPTS] == [[]] * len(PROMPTS)


def test_training_never_draws_a_held_out_look_nor_says_an_unknown_word() -> None:
    held_out = {replace(scene, motion=None) for scene in held_out_scenes()}
    assert len(set(held_out_scenes())) == 64
    assert len(held_out) == 16
    assert not held_out & set(training_looks())
    rng = Random(0)
    scenes = [replace(look, motion="up") for look in training_looks() for _ in range(10)]
    said = [training_caption(scene, rng) for scene in scenes]
    assert [text for text in said if unknown_words(text)] == []
    assert 0.07 < np.mean([text == "" for text in said]) < 0.14
    for scene, text in zip(scenes, said, strict=True):
        asked, true = vars(parse(text)), vars(scene)
        assert all(value in (None, true[name]) for name, value in asked.items()), text


# the checker


def test_checker_agrees_with_drawn_clips(drawn: tuple[list[Scene], np.ndarray]) -> None:
    scenes, clips = drawn
    assert min(_shares(clips, scenes).values()) >= 0.99


def test_checker_agrees_after_the_codec(
    drawn: tuple[list[Scene], np.ndarray], fitted: codec.Codec
) -> None:
    scenes, clips = drawn[0][::3], drawn[1][::3]
    pixels = torch.from_numpy(clips).permute(0, 1, 4, 2, 3)
    latents = fitted.encode(pixels, torch.arange(FRAMES).expand(len(clips), -1))
    decoded = fitted.decode(latents).permute(0, 1, 3, 4, 2).numpy()
    assert min(_shares(decoded, scenes).values()) >= 0.99


def test_swapped_captions_score_at_chance(drawn: tuple[list[Scene], np.ndarray]) -> None:
    scenes, clips = drawn
    swapped = scenes[:]
    Random(3).shuffle(swapped)
    shares = _shares(clips, swapped)
    chance = {"background": 1 / 5, "colour": 1 / 4, "shape": 1 / 3, "motion": 1 / 4}
    for name, share in chance.items():
        assert abs(shares[name] - share) < 0.12, name
    assert shares["all"] < 0.05


def test_still_and_reversed_clips_never_pass_for_motion(
    drawn: tuple[list[Scene], np.ndarray],
) -> None:
    scenes, clips = drawn[0][::3], drawn[1][::3]
    assert _shares(clips[:, ::-1], scenes)["motion"] == 0
    assert _shares(np.repeat(clips[:, 5:6], FRAMES, axis=1), scenes)["motion"] == 0


def test_a_second_object_is_counted_and_fails_the_clip() -> None:
    scene = Scene("red", "circle", "right", "blue", "plain")
    clip = Clip(scene, radius=0.12, centre=(0.5, 0.25), path=0.54, phase=0.0)
    one, two = _pixels([clip, replace(clip, centre=(0.5, 0.75))])
    both = np.maximum(one, two)
    assert score_clip(one, caption(scene)).all
    assert observe(both).objects == 2
    assert not score_clip(both, caption(scene)).all


def test_what_a_prompt_leaves_open_is_not_judged(drawn: tuple[list[Scene], np.ndarray]) -> None:
    clip = drawn[1][0]
    assert score_clip(clip, "") == PromptScore(None, None, None, None, None, 1)
    grey = np.full((FRAMES, 32, 32, 3), 0.43)
    assert score_clip(grey, "a grey background").all
    assert not score_clip(grey, "a red circle over a grey background").all


@pytest.mark.parametrize("shape", [(12, 96, 96), (0, 96, 96, 3), (12, 96, 96, 4)])
def test_checker_refuses_what_is_no_clip(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[F, H, W, 3\]"):
        score_clip(np.zeros(shape), "a red circle")


# the codec and the networks


def test_stock_vae_computes_the_plain_codec(fitted: codec.Codec) -> None:
    rng = Random(3)
    clips = [random_clip(scene, rng) for scene in held_out_scenes()[::16]]
    numbers = torch.arange(13).expand(4, 13)  # the stock encoder reads 4 k + 1 frames
    pixels, _ = draw(clips, numbers)
    plain = fitted.encode(pixels, numbers)
    vae = build_vae(fitted)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        posterior = vae.encode(pixels.transpose(1, 2) * 2 - 1).latent_dist
        shown = vae.decode(plain * std + mean).sample.transpose(1, 2)
    stock = (posterior.mode() - mean) / std
    torch.testing.assert_close(
        stock[:, : codec.COMPONENTS], plain[:, : codec.COMPONENTS], atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        stock[:, codec.COMPONENTS :], plain[:, codec.COMPONENTS :], atol=1e-5, rtol=0
    )
    torch.testing.assert_close((shown + 1) / 2, fitted.decode(plain), atol=1e-3, rtol=0)


def test_marks_tell_columns_rows_and_frames_apart() -> None:
    column, row, time = codec.marks(torch.arange(FRAMES), codec.GRID, codec.GRID)
    assert column[0, 0].tolist() == sorted(column[0, 0].tolist())
    assert torch.equal(column[3], row[3].T)
    assert (time.diff(dim=0)[: codec.TIME_REACH] > 0).all()
    assert column.abs().max() == row.abs().max() == time.abs().max() == codec.MARK_AMPLITUDE


def test_codec_keeps_the_picture(fitted: codec.Codec) -> None:
    clips = [random_clip(scene, Random(1)) for scene in held_out_scenes()[::4]]
    numbers = torch.arange(FRAMES).expand(len(clips), -1)
    pixels, _ = draw(clips, numbers)
    error = (fitted.decode(fitted.encode(pixels, numbers)) - pixels).square().mean()
    assert -10 * error.log10() > 31


@pytest.mark.parametrize("frames", [FRAMES, 3])
def test_training_forward_is_the_stock_forward(frames: int) -> None:
    torch.manual_seed(0)
    learner = train.Learner().eval()
    torch.nn.init.normal_(learner.transformer.proj_out.weight, std=0.1)
    torch.nn.init.normal_(learner.transformer.condition_embedder.text_embedder.linear_1.bias)
    tokenizer = model.build_tokenizer()
    captions = ["A red circle, moving left over a blue striped background.", ""]
    tokens = tokenizer(captions, padding="max_length", max_length=512, return_tensors="pt")
    latents, sigma = torch.randn(2, codec.CHANNELS, frames, 4, 6), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        words = learner.text_encoder(tokens["input_ids"], tokens["attention_mask"])
        padded = words.last_hidden_state * tokens["attention_mask"][..., None]
        stock = learner.transformer(latents, sigma * 1000, padded).sample
        text = flow.encode_captions(tokenizer, learner.text_encoder, captions)
        angles = flow.rotary(learner.transformer, torch.arange(frames), 4, 6)
        ours = flow.velocity(learner.transformer, latents, sigma, text, angles)
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)


def test_quadrant_heads_look_where_they_should() -> None:
    torch.manual_seed(0)
    attention = model.build_transformer().blocks[1].attn1  # head 1: later and left
    transformer = model.build_transformer()
    tokens = torch.randn(1, 12 * 12 * 12, 192)
    angles = flow.rotary(transformer, torch.arange(12), 12, 12)
    with torch.no_grad():
        rotated = [
            flow.rotate(flow.rms(norm, linear(tokens)), angles.cos, angles.sin)
            for linear, norm in (
                (attention.to_q, attention.norm_q),
                (attention.to_k, attention.norm_k),
            )
        ]
    query, key = (t.unflatten(-1, (3, 64))[0, :, 1] for t in rotated)
    middle = (6 * 12 + 6) * 12 + 6
    mass = (query[middle] @ key.T / 8).softmax(-1).view(12, 12, 12)
    assert mass[7:].sum() > 0.9
    assert mass[:, :, :6].sum() > 0.9


def test_untrained_cross_attention_looks_at_words_not_pads() -> None:
    torch.manual_seed(0)
    learner = train.Learner().eval()
    text = flow.encode_captions(
        model.build_tokenizer(), learner.text_encoder, ["a red circle moving left"]
    )
    words = learner.transformer.condition_embedder.text_embedder(text)
    attention = learner.transformer.blocks[0].attn2
    query = flow.rms(attention.norm_q, attention.to_q(torch.randn(50, 192)))
    key = flow.rms(attention.norm_k, attention.to_k(words))[0]
    query, key = (t.unflatten(-1, (3, 64)).transpose(0, 1) for t in (query, key))
    mass = (query @ key.mT / 8 + flow.text_bias()[0]).softmax(-1)[..., :6].sum(-1)
    assert mass.mean() > 0.5


# training


def test_a_batch_is_a_function_of_its_step(fitted: codec.Codec) -> None:
    stage = next(stage for stage in train.SCHEDULE if stage.name == "ends")
    first, again = (train.make_batch(stage, fitted, 7, 0) for _ in range(2))
    other = train.make_batch(stage, fitted, 8, 0)
    assert torch.equal(first.clean, again.clean)
    assert first.captions == again.captions
    assert not torch.equal(first.clean, other.clean)
    assert torch.equal(first.noise[::2], first.noise[1::2])  # pairs differ in direction alone
    assert first.frames[0] == 0
    assert first.frames[-1] == FRAMES - 1


def test_training_goes_on_from_its_checkpoint(tmp_path) -> None:
    stage = replace(train.SCHEDULE[0], batch=2, steps=2)
    run = train.Run(tmp_path, compiled=False)
    run.train(stage)
    resumed = train.Run(tmp_path, compiled=False)
    assert resumed.done == {"image": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    for (name, before), after in zip(
        run.learner.named_parameters(), resumed.learner.parameters(), strict=True
    ):
        assert torch.equal(before, after), name
        assert torch.equal(run.average[name], resumed.average[name]), name


def test_a_packed_pipeline_loads_with_the_same_weights(tmp_path, fitted: codec.Codec) -> None:
    learner = train.Learner()
    pack.write_pipeline(tmp_path, learner.transformer, learner.text_encoder, fitted)
    pipe = load_demo(tmp_path)
    for name, value in learner.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], value), name
    for name, value in learner.text_encoder.state_dict().items():
        assert torch.equal(pipe.text_encoder.state_dict()[name], value), name


# the shipped weights


def test_weights_are_small_and_never_pickled() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    assert pack.stored_bytes(WEIGHTS) <= 12 * MIB


def test_loads_offline_as_stock_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = load_demo()
    kinds = {
        "transformer": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
        "scheduler": UniPCMultistepScheduler,
    }
    assert type(pipe) is WanPipeline
    assert {name: type(getattr(pipe, name)) for name in kinds} == kinds
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    assert not pipe.transformer.training
    ids = pipe.tokenizer("a Red zebra").input_ids
    assert pipe.tokenizer.convert_ids_to_tokens(ids) == ["a", "red", "<unk>", "</s>"]
    assert set(WORDS) <= set(pipe.tokenizer.get_vocab())


def test_weights_hold_the_codec_that_is_fitted_here(demo: WanPipeline, fitted: codec.Codec) -> None:
    rebuilt = build_vae(fitted)
    stored, fresh = demo.vae.decoder.conv_out.weight, rebuilt.decoder.conv_out.weight
    torch.testing.assert_close(stored, fresh, atol=4e-3, rtol=0)


def _generate(pipe: WanPipeline, prompt: str, steps: int) -> np.ndarray:
    return pipe(
        prompt,
        height=DEMO_DEFAULTS["height"],
        width=DEMO_DEFAULTS["width"],
        num_frames=frames_argument(DEMO_DEFAULTS["frames"]),
        num_inference_steps=steps,
        guidance_scale=DEMO_DEFAULTS["guidance"],
        generator=torch.Generator().manual_seed(3),
    ).frames[0]


def test_generation_is_deterministic(demo: WanPipeline) -> None:
    first, again = (_generate(demo, PROMPTS[0], steps=2) for _ in range(2))
    assert first.shape == (FRAMES, 96, 96, 3)
    assert np.array_equal(first, again)


def test_generating_leaves_out_the_warning_about_a_factor_of_one(
    demo: WanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger(WanPipeline.__module__)
    use = Settings(prompt=PROMPTS[0], seed=0, steps=1, frames=4, height=32, width=32)
    log.addHandler(caplog.handler)  # diffusers' loggers do not hand on what they get
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        assert generate(demo, use).frames.shape[0] == 4
        assert not caplog.records
        demo(PROMPTS[0], height=32, width=32, num_frames=3, num_inference_steps=1)
        assert "has to be divisible by 1." in caplog.text
    finally:
        log.removeHandler(caplog.handler)
        log.setLevel(level)


def test_a_short_prompt_shows_what_it_asks_for(demo: WanPipeline) -> None:
    made = score_clip(_generate(demo, PROMPTS[0], steps=8), PROMPTS[0])
    assert made.background
    assert made.colour


def test_stored_score_is_the_documented_one() -> None:
    table = json.loads((WEIGHTS / "score.json").read_text())
    assert table["pairs"] == len(score.held_out_pairs()) == 64
    assert set(table["directions"]) == set(MOTIONS)


@pytest.mark.slow
def test_eight_pairs_score_as_stored(demo: WanPipeline) -> None:
    table = score.score_pipeline(demo, score.held_out_pairs()[::9])
    assert table.shares["background"] == 1
    assert table.shares["colour"] == 1
    assert table.shares["shape"] >= 7 / 8
    assert table.shares["motion"] >= 7 / 8
