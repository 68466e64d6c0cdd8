"""The plugin for vLLM-Omni's SPARSE_ATTN slot, driven as the slot's published contract says."""

import logging
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dittools
from dittools.errors import DitToolsError, InputError, UnknownMethod, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.serving import vllm_omni

ROOT = Path(__file__).parents[1]
GRID = TokenGrid(4, 6, 8)
LATENT = {"latent_shape": torch.tensor([[4, 12, 16]] * 2), "patch_size": torch.tensor([[1, 2, 2]])}


def plugin() -> Any:
    """The callable, found as the engine finds it: by its entry point."""
    lines = (ROOT / "pyproject.toml").read_text()
    group = r'\[project\.entry-points\."vllm_omni\.sparse_attn"\]\ndittools = "(.+)"'
    found = re.search(group, lines)
    assert found is not None
    return EntryPoint("dittools", found[1], "vllm_omni.sparse_attn").load()


class Slot:
    """The engine's side: three layers of parameters in one dict, refusals before the call."""

    def __init__(self, causal: bool = False, scale: float = 0.25, **static: Any) -> None:
        self.static, self.causal, self.scale = static, causal, scale
        self.call = plugin()
        self.masks = self.call.capabilities.get("supports_attention_mask", False)

    def forward(
        self,
        qkv: tuple[torch.Tensor, ...],
        state: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        merged = {**self.static, **(state or {}), **(extra or {})}
        params = {name: value for name, value in merged.items() if value is not None}
        if attn_mask is not None:
            assert self.masks
            params["attn_mask"] = attn_mask
        out = self.call(*qkv, params, is_causal=self.causal, softmax_scale=self.scale)
        assert isinstance(out, torch.Tensor)
        return out


def tensors(tokens: int = GRID.total, keys: int = 0, heads: int = 0) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, tokens, 2, 16), *(
        torch.randn(2, keys or tokens, heads or 2, 16) for _ in range(2)
    )


def dense(qkv: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv)
    return F.scaled_dot_product_attention(q, k, v, scale=0.25, **options).transpose(1, 2)


@pytest.mark.parametrize("name", ["radial", "gna", "sparge", "svg", "clear", "rectified", "paro"])
def test_runs_the_method_on_the_grid_the_engine_publishes(name: str) -> None:
    qkv = tensors()
    out = Slot(method=name, dense_steps=0, method_params={"block_size": 16}).forward(qkv, LATENT)
    method = dittools.METHODS[name](block_size=16)
    assert torch.equal(out, dittools.attention(*qkv, grid=GRID, method=method, scale=0.25))
    assert not torch.allclose(out, dense(qkv), atol=1e-3)


def test_leading_steps_stay_dense() -> None:
    qkv, slot = tensors(), Slot(method="radial", method_params={"block_size": 16}, dense_steps=0.5)
    for step in range(4):
        moment = {"denoise_step_idx": torch.tensor([step, 3]), "total_denoise_steps": [4, 4]}
        out = slot.forward(qkv, LATENT | moment)
        assert torch.allclose(out, dense(qkv), atol=1e-5) == (step < 2)


def test_share_of_a_run_of_unknown_length_is_said_and_runs_sparse(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_omni, "_TOLD", set())
    qkv = tensors()
    with caplog.at_level(logging.WARNING, "dittools"):
        for _ in range(2):
            out = Slot(method_params={"block_size": 16}).forward(qkv, LATENT)
    assert [r.getMessage() for r in caplog.records] == [
        "vLLM-Omni: every step runs sparse: the engine gave no step numbers"
    ]
    assert not torch.allclose(out, dense(qkv), atol=1e-3)


def test_text_beside_the_grid_is_placed_as_configured() -> None:
    qkv = tensors(GRID.total + 10)
    for where in ("before", "after"):
        grid = TokenGrid(4, 6, 8, **{f"text_{where}": 10})
        slot = Slot(method="radial", method_params={"block_size": 16}, dense_steps=0, text=where)
        want = dittools.attention(
            *qkv, grid=grid, method=dittools.METHODS["radial"](block_size=16), scale=0.25
        )
        assert torch.equal(slot.forward(qkv, LATENT), want)


def test_masks_over_keys_reach_the_method() -> None:
    qkv = tensors()
    keep = torch.rand(2, GRID.total) < 0.7
    slot = Slot(method="radial", method_params={"block_size": 16}, dense_steps=0)
    method = dittools.METHODS["radial"](block_size=16)
    want = dittools.attention(*qkv, grid=GRID, method=method, scale=0.25, key_mask=keep)
    assert torch.equal(slot.forward(qkv, LATENT, attn_mask=keep), want)
    assert torch.equal(slot.forward(qkv, LATENT, attn_mask=keep[:, None, None]), want)


@pytest.mark.parametrize("case", ["cross", "no grid", "sizes", "text", "pairs", "bias", "causal"])
def test_what_does_not_fit_runs_dense_and_says_why(
    case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_omni, "_TOLD", set())
    qkv, state, mask, options = tensors(), dict(LATENT), None, {}
    slot = Slot(causal=case == "causal", dense_steps=0)
    if case == "cross":
        qkv = tensors(keys=7)
    elif case == "no grid":
        state = {"total_latent_frames": 4, "patches_per_frame": 48}
    elif case == "sizes":
        state["latent_shape"] = [[4, 12, 16], [8, 12, 8]]
    elif case == "text":
        qkv = tensors(GRID.total + 5)
    elif case == "pairs":
        mask = torch.rand(2, 1, GRID.total, GRID.total) < 0.5
    elif case == "bias":
        mask = torch.randn(2, 1, 1, GRID.total)
    if mask is not None:
        options["attn_mask"] = mask
    options["is_causal"] = case == "causal"
    with caplog.at_level(logging.WARNING, "dittools"):
        out = slot.forward(qkv, state, attn_mask=mask)
    assert torch.allclose(out, dense(qkv, **options), atol=1e-6)
    assert "radial runs dense: " in caplog.text


def test_fewer_key_heads_are_repeated() -> None:
    q, k, v = tensors(heads=1)
    slot = Slot(method="radial", method_params={"block_size": 16}, dense_steps=0)
    want = slot.forward((q, k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1)), LATENT)
    assert torch.equal(slot.forward((q, k, v), LATENT), want)


def test_parameters_of_the_engine_are_left_alone() -> None:
    qkv = tensors()
    slot = Slot(method="radial", method_params={"block_size": 16}, dense_steps=0)
    want = slot.forward(qkv, LATENT)
    assert torch.equal(slot.forward(qkv, LATENT, {"kv_cache_dtype": None, "anything": 3}), want)


@pytest.mark.parametrize(
    ("params", "kind", "text"),
    [
        ({"method": "nearest"}, UnknownMethod, "nearest"),
        ({"method": "radial", "method_params": {"decya": 1}}, UnknownMethod, "decya"),
        ({"method": 3}, InputError, "malformed"),
        ({"dense_steps": -1}, InputError, "dense_steps"),
        ({"text": "left"}, InputError, "before"),
        ({"method": "vmoba"}, UnsupportedCall, "names no layer"),
        ({"method": "paro", "method_params": {"tables": "x"}}, UnsupportedCall, "names no layer"),
        ({"kernel": "nvidia", "dense_steps": 0}, UnsupportedCall, "unknown backend"),
    ],
)
def test_wrong_configuration_is_one_clear_error(
    params: dict[str, Any], kind: type[DitToolsError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        Slot(**params).forward(tensors(), LATENT)


def test_stands_outside_of_compiled_graphs() -> None:
    qkv = tensors()
    slot = Slot(method="radial", method_params={"block_size": 16}, dense_steps=0)
    block = torch.compile(lambda *t: slot.forward(t, LATENT) * 2, backend="eager")
    assert torch.equal(block(*qkv), slot.forward(qkv, LATENT) * 2)
