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


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("key_mask", torch.ones(1, 5, dtype=torch.bool)),  # kernels would read past its end
        ("key_mask", torch.ones(3, 32, dtype=torch.bool)),
        ("key_mask", torch.ones(32, dtype=torch.bool)),
        ("key_mask", torch.ones(1, 32)),
        ("key_bias", torch.zeros(1, 2, 31)),
        ("key_bias", torch.zeros(1, 3, 32)),
        ("key_bias", torch.zeros(1, 32)),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_what_weighs_keys_has_one_weight_for_each(
    backend: str, name: str, weights: torch.Tensor
) -> None:
    query = torch.randn(1, 32, 2, 16)
    mask = dittools.BlockMask(torch.eye(4, dtype=torch.bool)[None], 8)
    with pytest.raises(dittools.UnsupportedCall, match=f"{name} does not fit the keys; expected"):
        dittools.block_sparse_attention(
            query,
            query,
            query,
            mask,
            backend=backend,
            **{name: weights},  # type: ignore[arg-type]
        )


def test_whole_numbers_are_no_queries() -> None:
    query = torch.ones(1, 32, 2, 16, dtype=torch.long)
    with pytest.raises(dittools.UnsupportedCall, match="expected a floating-point dtype; got int"):
        dittools.attention(query, query, query, grid=dittools.TokenGrid(2, 4, 4))


def test_a_method_is_a_name_or_an_object_and_a_grid_a_grid() -> None:
    query, grid = torch.randn(1, 32, 2, 16), dittools.TokenGrid(2, 4, 4)
    for wrong in (3, dittools.Radial):
        with pytest.raises(dittools.UnknownMethod, match="expected a method name or a configured"):
            dittools.attention(query, query, query, grid=grid, method=wrong)  # type: ignore[arg-type]
    with pytest.raises(dittools.InputError, match="expected a TokenGrid; got tuple"):
        dittools.attention(query, query, query, grid=(2, 4, 4))  # type: ignore[arg-type]
