"""Token merging beside the authors' package, on random grids."""

import pytest
import torch

from dittools.grid import TokenGrid
from dittools.methods.merging import match, merge, unmerge

pytestmark = pytest.mark.oracle


def test_merging_equals_tomesd_on_random_grids() -> None:
    """The first token of each cell stays, as with their `no_rand`; their draw is not repeatable."""
    theirs = pytest.importorskip("tomesd.merge", reason="`make test-oracles` installs tomesd")
    compared = 0
    for seed in range(60):
        torch.manual_seed(seed)
        height, width = torch.randint(4, 24, (2,)).tolist()
        side = int(torch.randint(2, 5, (1,)))
        tokens = height * width
        wanted = int(tokens * float(torch.rand(1)) * 0.9)
        x, y = (torch.randn(2, tokens, c, dtype=torch.float64) for c in (7, 5))
        joined, parted = theirs.bipartite_soft_matching_random2d(
            x, width, height, side, side, wanted, no_rand=True
        )
        found = match(x, TokenGrid(1, height, width), (side, side), None)
        assert found is not None
        count = min(wanted, len(found.sources))
        if count == 0:
            continue
        ours = unmerge(merge(y, found, count), found, count)
        torch.testing.assert_close(ours, parted(joined(y)), atol=1e-12, rtol=0)
        compared += 1
    assert compared > 50
