"""Groups of tokens whose numbers are of any size a dtype can hold."""

import pytest
import torch

from dittools.methods.partition import (
    Effort,
    kmeans_labels,
    profile_labels,
    response_labels,
    split_labels,
)

EFFORT = Effort(first=3, later=1, sample=0, seed=0)


def _tokens() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 90, 16, generator=draw) for _ in range(2))
    return query, key


@pytest.mark.parametrize("size", [2.0**66, 2.0**110, 2.0**-66, 2.0**-110])
@pytest.mark.parametrize("scaled", ["query", "key"])
def test_groups_do_not_depend_on_the_unit(size: float, scaled: str) -> None:
    query, key = _tokens()
    by = {"query": size if scaled == "query" else 1.0, "key": size if scaled == "key" else 1.0}
    wide = query * by["query"], key * by["key"]
    for found, expected in (
        (split_labels(*wide, (16, 8)), split_labels(query, key, (16, 8))),
        (
            response_labels(*wide, (5, 7), None, EFFORT),
            response_labels(query, key, (5, 7), None, EFFORT),
        ),
    ):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e19, 1e30, 3e37])
@pytest.mark.parametrize("ways", [kmeans_labels, profile_labels, response_labels])
def test_every_token_has_a_group_whatever_its_size(size: float, ways: object) -> None:
    query, key = _tokens()
    assert callable(ways)
    for labels, count in zip(
        ways(query * size, key * size, (5, 7), None, EFFORT), (5, 7), strict=True
    ):
        assert int(labels.min()) >= 0
        assert int(labels.max()) < count
