"""The entry points that need no pipeline."""

import pytest
import torch

import dittools


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("queries", "keys"), [(100, 60), (60, 100), (65, 1)])
def test_a_mask_may_have_any_number_of_keys(backend: str, queries: int, keys: int) -> None:
    query = torch.randn(2, queries, 3, 32)
    key, value = torch.randn(2, 2, keys, 3, 32).unbind()
    keep = torch.rand(3, -(-queries // 16), -(-keys // 16)) < 0.6
    keep[:, :, 0] = True
    mask = dittools.BlockMask(keep, 16, q_tokens=queries, kv_tokens=keys)
    out = dittools.block_sparse_attention(query, key, value, mask, backend=backend)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (query, key, value)), attn_mask=mask.to_dense()
    ).transpose(1, 2)
    assert (out - wanted).abs().max() < 1e-5


def test_a_method_needs_the_keys_of_its_own_sequence() -> None:
    grid = dittools.TokenGrid(2, 4, 4)
    query, key = torch.randn(1, 32, 2, 16), torch.randn(1, 31, 2, 16)
    with pytest.raises(dittools.UnsupportedCall, match="expected 32 keys; got 31"):
        dittools.attention(query, key, key, grid=grid, method="gna")


def test_a_method_that_does_not_fit_runs_dense_and_warns() -> None:
    grid = dittools.TokenGrid(1, 4, 4)
    query, key, value = torch.randn(3, 1, 16, 2, 16).unbind()
    with pytest.warns(UserWarning, match="radial needs 2 frames"):
        out = dittools.attention(query, key, value, grid=grid, method="radial")
    dense = dittools.attention(query, key, value, grid=grid, method="dense")
    assert torch.equal(out, dense)


def test_an_unknown_method_lists_the_names() -> None:
    grid = dittools.TokenGrid(1, 4, 4)
    query = torch.randn(1, 16, 2, 16)
    with pytest.raises(dittools.UnknownMethod, match="radial, gna"):
        dittools.attention(query, query, query, grid=grid, method="sparkle")
