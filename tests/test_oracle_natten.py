"""Neighborhood attention beside NATTEN's own pure-torch backend; run by `make test-oracles`."""

import pytest
import torch

import dittools
from dittools.methods.gna import GNA

natten = pytest.importorskip("natten", reason="natten is not installed: make test-oracles")

pytestmark = pytest.mark.oracle


def _case(seed: int) -> tuple[tuple[int, int, int], dict[str, tuple[int, ...]]]:
    """Draw a grid of at most about 1,000 tokens, and windows, strides and dilations that fit it."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    shape = (number(2, 7), number(3, 12), number(3, 12))
    dilation = tuple(number(1, max(1, side // 3)) for side in shape)
    window = tuple(number(2, side // d) for side, d in zip(shape, dilation, strict=True))
    stride = tuple(number(1, w) for w in window)
    causal = tuple(number(0, 3) == 0 for _ in shape)
    return shape, {"window": window, "stride": stride, "dilation": dilation, "causal": causal}


@pytest.mark.parametrize("seed", range(40))
def test_gna_equals_natten(seed: int) -> None:
    shape, params = _case(seed)
    grid = dittools.TokenGrid(*shape)
    query, key, value = torch.randn(3, 1, grid.total, 2, 16).unbind()
    ours = dittools.attention(
        query, key, value, grid=grid, method=GNA(block_size=16, **params), backend="cpu"
    )
    theirs = natten.na3d(
        *(t.view(1, *shape, 2, 16) for t in (query, key, value)),
        kernel_size=params["window"],
        stride=params["stride"],
        dilation=params["dilation"],
        is_causal=params["causal"],
        backend="flex-fna",
    ).view_as(ours)
    assert (ours - theirs).abs().max() < 2e-6
