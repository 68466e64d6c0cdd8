"""What cannot be attached to is named with the way out; guidance and experts are told apart."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import Spy, build_toy, generate, shared

from dittools.errors import AttachError
from dittools.patches import attach
from dittools.patches.seam import is_shadow

SLICED = "SlicedAttnProcessor cannot be intercepted; undo it with pipe.disable_attention_slicing()"


def test_sliced_attention_is_named_with_how_to_undo_it() -> None:
    pipe, spy = build_toy("sd"), Spy()
    pipe.enable_attention_slicing(1)
    with attach(pipe, spy) as handle:
        generate(pipe, "sd", num_inference_steps=1)
        report = handle.report()
        assert spy.seen == []
        assert any(SLICED in note for note in report.notes)
        assert set(report.coverage["never_fired"].values()) == {SLICED}
        assert SLICED in str(report)
        pipe.disable_attention_slicing()  # the plan is taken up without attaching anew
        generate(pipe, "sd", num_inference_steps=1)
        assert {c.layer for c in spy.seen} == set(range(len(report.layers)))
    assert not any(is_shadow(type(p)) for p in pipe.unet.attn_processors.values())


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("XFormersAttnProcessor", "pipe.disable_xformers_memory_efficient_attention()"),
        ("AttnProcessor", "set_attn_processor with the stock processor of this model"),
    ],
)
def test_other_blind_processors_are_named_too(kind: str, remedy: str) -> None:
    from diffusers.models import attention_processor

    pipe = build_toy("sd")
    made = getattr(attention_processor, kind)
    pipe.unet.set_attn_processor(made.__new__(made))
    notes = attach(pipe, "dense").report().notes
    assert notes
    assert all(f"{kind} cannot be intercepted; undo it with {remedy}" in note for note in notes)


def test_a_pipeline_without_a_denoiser_says_what_it_found() -> None:
    parts = shared("wan").components
    pipe = SimpleNamespace(components={"vae": parts["vae"], "text_encoder": parts["text_encoder"]})
    with pytest.raises(AttachError, match=r"SimpleNamespace has no denoiser.*denoisers: none"):
        attach(pipe, "dense")
    unknown = SimpleNamespace(components={"transformer": torch.nn.Linear(1, 1)})
    with pytest.raises(AttachError, match=r"denoisers: Linear.*register_family"):
        attach(unknown, "dense")


@pytest.mark.parametrize(
    ("name", "guidance", "branches"),
    [
        ("wan", 5.0, ["cond", "uncond"]),  # two calls
        ("wan", 1.0, ["cond"]),
        ("cogvideox", 6.0, ["cond_uncond"]),  # one call of two rows
        ("ltx", 1.0, ["cond"]),  # diffusers still calls it cond_uncond
        ("cosmos", 5.0, ["cond", "uncond"]),  # unnamed, by order
    ],
)
def test_branches_of_guidance_are_told_apart(
    name: str, guidance: float, branches: list[str]
) -> None:
    pipe, spy = shared(name), Spy()
    with attach(pipe, spy):
        generate(pipe, name, num_inference_steps=2, guidance_scale=guidance)
    calls: list[Any] = [c for c in spy.seen if c.layer == 0]
    assert [c.branch for c in calls] == branches * 2
    assert [c.step for c in calls] == sorted([0, 1] * len(branches))
    assert {len(c.query) for c in calls} == {2 if branches == ["cond_uncond"] else 1}
