"""Metered attention and its parts: pooled compensation, error score, repair, probe rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.block_sampling import slots_amid
from dittools.methods.compensation import (
    Runs,
    block_mask,
    padded_order,
    pool_runs,
    sparse_rows,
    with_pooled_keys,
)
from dittools.methods.error_score import pooling_error
from dittools.methods.metered import Metered
from dittools.methods.metered_blocks import Blocks, alike_keys, alike_order, cut_lasts
from dittools.methods.metered_state import State
from dittools.methods.probes import exact_rows, probe_rows, relative_error
from dittools.methods.repair import fit_repair
from dittools.methods.selection import keep_share

BACKEND = ReferenceBackend()
GRIDS = [
    TokenGrid(3, 6, 7),
    TokenGrid(3, 6, 7, 5, 0),
    TokenGrid(2, 5, 9, 0, 11),
    TokenGrid(1, 9, 13),
]
SIZE = 16


def call_of(grid: TokenGrid, heads: int = 3, batch: int = 1, **context: Any) -> AttentionCall:
    shape = (batch, grid.total, heads, 16)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return AttentionCall(q, k, v, grid, **context)


def dense(call: AttentionCall) -> torch.Tensor:
    return BACKEND.dense(call)


def some_blocks(call: AttentionCall, share: float, key_size: int = SIZE) -> torch.Tensor:
    blocks, key_blocks = (-(-call.grid.tokens // size) for size in (SIZE, key_size))
    return torch.rand(call.head_count, blocks, key_blocks) < share


def compensated(
    call: AttentionCall,
    kept: torch.Tensor,
    names: tuple[str, ...] = ("hwf",),
    key_size: int = SIZE,
) -> Any:
    """Return the output, mask and order of kept blocks with the others pooled."""
    order = padded_order(call.grid, names, SIZE)
    runs = pool_runs(call, order, kept.shape[2], key_size, key_size)
    mask = block_mask(kept, call.grid, order, SIZE, True, key_size)
    return BACKEND.block_sparse(with_pooled_keys(call, runs), mask), mask, order


def groups_of(order: Any, head: int, size: int, blocks: int) -> list[torch.Tensor]:
    """Return the tokens of the first blocks."""
    return [g[g >= 0] for g in order.index[head % len(order.index)].view(-1, size)[:blocks]]


def by_definition(
    call: AttentionCall, kept: torch.Tensor, order: Any, key_size: int = SIZE, key_order: Any = None
) -> torch.Tensor:
    """One softmax per query over kept tokens, text, and means that weigh as many tokens."""
    grid, out = call.grid, torch.empty_like(call.query)
    for head in range(call.head_count):
        asked = groups_of(order, head, SIZE, kept.shape[1])
        owner = {int(t): i for i, g in enumerate(asked) for t in g}
        groups = groups_of(key_order or order, head, key_size, kept.shape[2])
        text = [t for t in range(grid.total) if t not in owner]
        q, k, v = (x[0, :, head] for x in (call.query, call.key, call.value))
        for token in range(grid.total):
            keys, values, log = [k[text]], [v[text]], [torch.zeros(len(text)).double()]
            for j, g in enumerate(groups):
                whole = token not in owner or bool(kept[head, owner[token], j])
                keys.append(k[g] if whole else k[g].mean(0, keepdim=True))
                values.append(v[g] if whole else v[g].mean(0, keepdim=True))
                n = torch.tensor([1.0 if whole else len(g)], dtype=torch.float64)
                log.append(n.log().expand(len(g) if whole else 1))
            scores = torch.cat(keys) @ q[token] * call.softmax_scale + torch.cat(log)
            out[0, token, head] = scores.softmax(0) @ torch.cat(values)
    return out


# --- pooled compensation


@pytest.mark.parametrize("key_size", [SIZE, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_skipped_blocks_take_part_as_their_means_in_one_softmax(
    grid: TokenGrid, key_size: int
) -> None:
    call = call_of(grid)
    kept = some_blocks(call, 0.3, key_size)
    out, mask, order = compensated(call, kept, key_size=key_size)
    torch.testing.assert_close(out, by_definition(call, kept, order, key_size))
    sizes, keys = (
        torch.full((count,), size)
        for count, size in zip(kept.shape[1:], (SIZE, key_size), strict=True)
    )
    sizes[-1] = grid.tokens - SIZE * (len(sizes) - 1)
    keys[-1] = grid.tokens - key_size * (len(keys) - 1)
    pairs = torch.einsum("hij,i,j->h", kept.double(), sizes.double(), keys.double())
    pairs += torch.einsum("hij,i->h", (~kept).double(), sizes.double())
    pairs += grid.total**2 - grid.tokens**2
    assert mask.density == pytest.approx(float(pairs.mean()) / grid.total / mask.kv_tokens)
    assert int(mask.to_dense().sum()) == int(pairs.sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_exact_is_dense(grid: TokenGrid) -> None:
    call = call_of(grid)
    out, *_ = compensated(call, some_blocks(call, 2.0))
    torch.testing.assert_close(out, dense(call))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equal_keys_in_every_block_make_it_exact_at_any_density(grid: TokenGrid) -> None:
    call = call_of(grid)
    order = padded_order(grid, ("hwf",), SIZE)
    key = call.key.clone()
    for group in order.index[0].view(-1, SIZE):
        some = group[group >= 0]
        key[:, some] = key[:, some[:1]]
    alike = replace(call, key=key)
    out, *_ = compensated(alike, some_blocks(call, 0.2))
    torch.testing.assert_close(out, dense(alike))


def test_none_exact_is_attention_over_the_means() -> None:
    call = call_of(TokenGrid(3, 6, 7))
    out, *_ = compensated(call, some_blocks(call, -1.0))
    runs = pool_runs(call, padded_order(call.grid, ("hwf",), SIZE), 8, SIZE, SIZE)
    key, value = runs.key[:, :, 0].double(), runs.value[:, :, 0].double()
    scores = call.query[0].transpose(0, 1) @ key.transpose(1, 2) * call.softmax_scale
    found = (scores + runs.weight[..., 0].log()[:, None]).softmax(-1) @ value
    torch.testing.assert_close(out[0].transpose(0, 1), found, atol=1e-6, rtol=1e-6)
    assert sorted(set(runs.weight.flatten().tolist())) == [126 % SIZE, SIZE]


def test_a_mean_weighs_as_two_of_half_its_tokens() -> None:
    call = call_of(TokenGrid(1, 8, 8))
    one = Runs(*(torch.randn(3, 4, 1, 16).double() for _ in range(2)), torch.full((3, 4, 1), 16.0))
    two = Runs(*(x.repeat(1, 2, 1, 1) for x in one[:2]), torch.full((3, 8, 1), 8.0))
    outs = [dense(replace(with_pooled_keys(call, r), grid=call.grid)) for r in (one, two)]
    torch.testing.assert_close(outs[0], outs[1])


def test_keys_that_are_masked_out_enter_no_mean() -> None:
    call = call_of(TokenGrid(1, 8, 8))
    dropped = torch.rand(1, 64) < 0.3
    dropped[0, :SIZE] = True  # a block with nothing left
    junk = call.key.masked_fill(dropped[..., None, None], 1e4)
    masked = replace(call, key=junk, key_mask=~dropped)
    kept = some_blocks(call, 0.3)
    out, *_ = compensated(masked, kept, ("fhw",))
    clean = replace(call, key_mask=~dropped)
    assert out.isfinite().all()
    torch.testing.assert_close(out, compensated(clean, kept, ("fhw",))[0])


@pytest.mark.parametrize("key_size", [SIZE, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_single_rows_are_those_of_the_whole(grid: TokenGrid, key_size: int) -> None:
    call, rows = call_of(grid), torch.tensor([1, 17, 40]) + grid.text_before
    kept = some_blocks(call, 0.3, key_size)
    out, _, order = compensated(call, kept, key_size=key_size)
    runs = pool_runs(call, order, kept.shape[2], key_size, key_size)
    found = sparse_rows(with_pooled_keys(call, runs), rows, kept, order, SIZE, key_size)
    torch.testing.assert_close(found.double(), out[:, rows], atol=1e-5, rtol=1e-5)


# --- error score


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("text", [0, 6])
def test_the_score_is_the_squared_error_of_every_token_of_a_block(pooled: bool, text: int) -> None:
    call = call_of(TokenGrid(1, 8, 8, 0, text), heads=2)
    method = Metered(rows=SIZE, block_size=SIZE, order="fhw", mode="repair" if pooled else "drop")
    order = padded_order(call.grid, ("fhw",), SIZE)
    runs = pool_runs(call, order, 4, SIZE, 1)
    found = method.scores(call, Blocks(order, None, SIZE, SIZE), runs)
    q, k, v = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
    weight = (q @ k.transpose(1, 2) * call.softmax_scale).exp()
    total = weight.sum(-1, keepdim=True)
    key, value = (x[:, :64].unflatten(1, (4, SIZE)).mean(2) for x in (k, v))
    mean = (q[:, :64] @ key.transpose(1, 2) * call.softmax_scale).exp()  # [H, 64, 4]
    exact = weight[:, :64, :64, None] * v[:, None, :64]
    stand_in = (mean[..., None] * value[:, None]).repeat_interleave(SIZE, dim=2)
    apart = exact - stand_in if pooled else exact
    error = (apart.square().sum(-1) / total[:, :64].square()).unflatten(2, (4, SIZE)).sum(3)
    wanted = error.unflatten(1, (4, SIZE)).mean(2)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_may_be_ranked_by_their_mass(grid: TokenGrid, apart: bool) -> None:
    call = call_of(grid)
    method = Metered(block_size=SIZE, rows=SIZE, score="mass", order="wfh")
    order, blocks = padded_order(grid, ("wfh",), SIZE), -(-grid.tokens // SIZE)
    keys = padded_order(grid, ("hfw",), SIZE) if apart else order
    alike = call.key.clone()  # runs of two keys are pooled: pairs of slots hold equal ones
    pairs = keys.index[0][: blocks * SIZE].view(-1, 2)
    pairs = pairs[(pairs >= 0).all(1)]
    alike[:, pairs[:, 1]] = alike[:, pairs[:, 0]]
    call = replace(call, key=alike)
    cut = Blocks(order, keys if apart else None, SIZE, SIZE)
    found = method.scores(call, cut, pool_runs(call, order, blocks, SIZE, 2))
    q, k = (x[0].transpose(0, 1) for x in (call.query, call.key))
    mass = (q @ k.transpose(1, 2) * call.softmax_scale).softmax(-1)
    asked, groups = (groups_of(x, 0, SIZE, blocks) for x in (order, keys))
    wanted = torch.stack(
        [torch.stack([mass[:, i][:, :, j].sum((1, 2)) for j in groups], 1) for i in asked], 1
    )
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def test_pooling_equal_tokens_costs_nothing() -> None:
    call = call_of(TokenGrid(1, 8, 8))
    flat = {n: getattr(call, n)[:, ::SIZE].repeat_interleave(SIZE, 1) for n in ("key", "value")}
    runs = pool_runs(replace(call, **flat), padded_order(call.grid, ("fhw",), SIZE), 4, SIZE, 1)
    query = call.query[0].transpose(0, 1).float()
    none = torch.full(query.shape[:2], float("-inf"))
    runs = Runs(*(x.float() for x in runs))
    assert pooling_error(query, runs, none, 0.25, SIZE, True).abs().max() < 1e-6
    assert pooling_error(query, runs, none, 0.25, SIZE, False).min() > 1e-6


# --- repair


def test_a_constant_residual_is_removed_exactly() -> None:
    true = torch.randn(1, 200, 3, 16)
    found = true + torch.randn(3, 16)
    rows = probe_rows(200, 64, 0)
    repair = fit_repair(found[:, rows], true[:, rows])
    repair.apply(found, slice(None))
    torch.testing.assert_close(found, true, atol=2e-5, rtol=1e-4)
    assert float(repair.after.max()) < 1e-5 < float(repair.before.min())


def test_a_zero_residual_changes_nothing() -> None:
    true = torch.randn(1, 200, 3, 16)
    out = true.clone()
    fit_repair(out[:, :64], true[:, :64]).apply(out, slice(None))
    assert torch.equal(out, true)


def test_an_error_that_follows_the_output_is_mended_on_rows_never_seen() -> None:
    true = torch.randn(1, 1000, 2, 16)
    found = true @ (0.7 * torch.eye(16) + 0.05 * torch.randn(16, 16))
    rows = probe_rows(1000, 64, 1)
    repair = fit_repair(found[:, rows], true[:, rows])
    before = relative_error(found, true)
    repair.apply(found, slice(None))
    after = relative_error(found, true)
    assert (after < 0.35 * before).all()
    torch.testing.assert_close(repair.before, before, rtol=0.15, atol=0)
    torch.testing.assert_close(repair.after, after, rtol=0.35, atol=0.01)  # fitted on fewer rows


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_error_that_follows_the_query_is_mended_from_the_query(earlier: int) -> None:
    query, true = torch.randn(2, 1, 1000, 2, 16)
    found = true - query @ (0.3 * torch.randn(16, 16))
    rows = probe_rows(1000, 64, 1)
    known = None
    for seed in range(2, 2 + earlier):
        old = probe_rows(1000, 64, seed)
        known = fit_repair(found[:, old], true[:, old], query=query[:, old]).rows.before(known, 64)
    before = relative_error(found, true)
    blind, seeing = found.clone(), found.clone()
    fit_repair(found[:, rows], true[:, rows]).apply(blind, slice(None))
    fit = fit_repair(found[:, rows], true[:, rows], query=query[:, rows], earlier=known)
    fit.apply(seeing, slice(None), query=query)
    errors = [float((relative_error(x, true) / before).mean()) for x in (blind, seeing)]
    assert errors[1] < (0.3, 0.2)[earlier] < 0.5 < errors[0]


def test_rows_of_earlier_calls_fade_by_half_and_the_oldest_go() -> None:
    known = None
    for call in range(4):
        x = torch.full((1, 8, 1, 4), float(call))
        known = fit_repair(x, x + 1).rows.before(known, 16)
    assert known is not None
    assert known.features[0, :, 0].tolist() == [3.0] * 8 + [2.0] * 8
    torch.testing.assert_close(known.root.square()[0, :, 0], torch.tensor([0.5] * 8 + [0.25] * 8))


def test_the_gate_leaves_errors_alone_that_no_row_foretells() -> None:
    true = torch.randn(1, 2000, 8, 16)
    noise = 0.5 * torch.randn_like(true)
    rows = probe_rows(2000, 64, 2)
    gated, open_gate = true + noise, true + noise
    fit_repair(gated[:, rows], true[:, rows]).apply(gated, slice(None))
    free = fit_repair(open_gate[:, rows], true[:, rows], gated=False)
    free.apply(open_gate, slice(None))
    kept, lost = (relative_error(x, true).mean() for x in (gated, open_gate))
    # the part of such an error that follows the output can be taken off; the rest is chance
    assert kept <= 0.5 < lost + 0.05
    assert kept < lost


def test_repair_keeps_to_the_heads_and_tokens_it_is_given() -> None:
    out, true = torch.randn(1, 100, 3, 16), torch.randn(1, 100, 3, 16)
    before = out.clone()
    fit = fit_repair(0.5 * true[:, :64], true[:, :64])
    fit.apply(out, slice(10, 90), torch.tensor([True, False, True]))
    assert torch.equal(out[:, :, 1], before[:, :, 1])
    assert torch.equal(out[:, :10], before[:, :10])
    assert torch.equal(out[:, 90:], before[:, 90:])
    assert not torch.equal(out[:, 10:90, [0, 2]], before[:, 10:90, [0, 2]])


# --- probe rows


def test_probe_rows_are_one_draw_from_each_of_equal_runs() -> None:
    rows = probe_rows(1000, 64, 5)
    edges = torch.arange(65) * 1000 // 64
    assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()
    assert torch.equal(rows, probe_rows(1000, 64, 5))
    assert not torch.equal(rows, probe_rows(1000, 64, 6))
    assert torch.equal(probe_rows(7, 64, 0), torch.arange(7))


def test_the_squared_error_of_probe_rows_is_that_of_all_rows_on_average() -> None:
    true = torch.randn(1, 600, 2, 8) * torch.linspace(0.2, 2, 600)[:, None, None]
    found = true + torch.randn_like(true) * torch.linspace(1, 0, 600)[:, None, None]
    apart = [(found - true)[:, probe_rows(600, 32, s)].square().mean() for s in range(400)]
    assert torch.stack(apart).mean() == pytest.approx(
        float((found - true).square().mean()), rel=0.02
    )


def test_probe_rows_are_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(TokenGrid(2, 5, 9, 4), batch=2)
    masked = replace(
        call, key_mask=torch.rand(2, 94) < 0.8, key_bias=torch.randn(1, 3, 94).double()
    )
    monkeypatch.setattr("dittools.methods.probes._CHUNK", 500)  # a head at a time
    rows = probe_rows(90, 12, 0)
    torch.testing.assert_close(exact_rows(masked, rows), dense(masked)[:, rows])


# --- the method

SMALL: dict[str, Any] = {"block_size": SIZE, "probes": 16, "density": 0.3}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_density_one_is_dense_and_text_rows_always_are(grid: TokenGrid) -> None:
    call = call_of(grid)
    assert torch.equal(Metered(density=1.0).attend(call, BACKEND), dense(call))
    for mode in ("drop", "pooled", "repair"):
        out = Metered(mode=mode, **SMALL).attend(call, BACKEND)
        text = [t for t in range(grid.total) if not 0 <= t - grid.text_before < grid.tokens]
        torch.testing.assert_close(out[:, text], dense(call)[:, text], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["drop", "pooled", "repair"])
def test_probe_rows_come_out_dense_and_no_other_row_is_touched_without_repair(mode: str) -> None:
    call = call_of(TokenGrid(3, 6, 7), layer=2, step=3)
    method = Metered(mode=mode, **SMALL)
    out, exact = method.attend(call, BACKEND), dense(call)
    rows = method._rows(call)
    torch.testing.assert_close(out[:, rows], exact[:, rows])
    others = torch.ones(126, dtype=torch.bool)
    others[rows] = False
    assert not torch.allclose(out[:, others], exact[:, others], atol=1e-2)
    if mode != "repair":  # off means the parts alone, to the bit
        plain = replace(method, probes=0, refresh=0.0).attend(replace(call, memory={}), BACKEND)
        assert torch.equal(out[:, others], plain[:, others])


@pytest.mark.parametrize("score", ["error", "mass"])
@pytest.mark.parametrize("key_size", [SIZE, 8])
def test_it_is_the_program_of_its_parts(key_size: int, score: str) -> None:
    call = call_of(TokenGrid(3, 6, 7))
    method = Metered(
        mode="pooled",
        order="wfh",
        probes=0,
        block_size=SIZE,
        key_block=key_size,
        density=0.3,
        score=score,
    )
    memory = call.memory
    out = method.attend(call, BACKEND)
    (state,) = memory.values()
    assert state.kept.sum(dim=(1, 2)).tolist() == [round(0.3 * 8 * 128 // key_size)] * 3
    torch.testing.assert_close(
        out, by_definition(call, state.kept, state.order, key_size), atol=1e-6, rtol=1e-6
    )
    drop = replace(method, mode="drop")
    drop.attend(replace(call, memory=memory), BACKEND)
    kept = memory[next(k for k in memory if "'drop'" in k)].kept.view(3, 8, 8, -1)
    assert kept.diagonal(dim1=1, dim2=2).all()  # keys of the queries' own block


def alike_blocks(call: AttentionCall, key_size: int) -> Blocks:
    keys = alike_order(alike_keys(call, key_size), call.grid, SIZE)
    return Blocks(padded_order(call.grid, ("hwf",), SIZE), keys, SIZE, key_size)


@pytest.mark.parametrize("key_size", [SIZE, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_keys_may_be_cut_otherwise_than_queries(grid: TokenGrid, key_size: int) -> None:
    call = call_of(grid)
    dropped = torch.rand(1, grid.total) < 0.2
    call = replace(call, key_mask=~dropped)
    blocks, kept = alike_blocks(call, key_size), some_blocks(call, 0.3, key_size)
    assert blocks.keys is not None
    assert blocks.keys.is_valid()
    made = with_pooled_keys(call, blocks.runs(call).pooled())
    mask = blocks.mask(kept, grid, True)
    out = blocks.attend(made, BACKEND, mask)
    assert out is not None
    plain = replace(call, key_mask=None)
    without = blocks.attend(
        with_pooled_keys(plain, blocks.runs(plain).pooled()), BACKEND, blocks.mask(kept, grid, True)
    )
    wanted = by_definition(plain, kept, blocks.order, key_size, blocks.keys)
    torch.testing.assert_close(without, wanted, atol=1e-6, rtol=1e-6)
    junk = replace(call, key=call.key.masked_fill(dropped[..., None, None], 1e4))
    again = with_pooled_keys(junk, blocks.runs(junk).pooled())
    torch.testing.assert_close(blocks.attend(again, BACKEND, mask), out, atol=1e-6, rtol=1e-6)
    rows = torch.tensor([1, 17, 40]) + grid.text_before
    found = blocks.rows(made, rows, kept)
    torch.testing.assert_close(found.double(), out[:, rows], atol=1e-5, rtol=1e-5)
    assert mask.pairs is not None
    pairs = mask.density * mask.q_tokens * mask.kv_tokens
    assert pairs == pytest.approx(
        float(block_mask(kept, grid, blocks.order, SIZE, True, key_size).pairs.mean())
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["drop", "pooled", "repair"])
@pytest.mark.parametrize("score", ["error", "mass"])
def test_alike_keys_run_in_every_mode_by_either_score(mode: str, score: str) -> None:
    call = call_of(TokenGrid(3, 6, 7, 0, 5))
    method = Metered(mode=mode, score=score, keys="alike", key_block=8, **SMALL)
    out, exact = method.attend(call, BACKEND), dense(call)
    text = slice(126, None)
    torch.testing.assert_close(out[:, text], exact[:, text], atol=1e-6, rtol=1e-6)
    rows = method._rows(call)
    torch.testing.assert_close(out[:, rows], exact[:, rows])
    state = chosen(call)
    assert state.kept is not None
    if mode != "drop":
        assert state.kept.sum(dim=(1, 2)).tolist() == [round(0.3 * 8 * 16)] * 3
        others = torch.ones(131, dtype=torch.bool)
        others[rows] = False
        assert not torch.allclose(out[:, others], exact[:, others], atol=1e-2)
    else:
        few = replace(method, density=0.01, probes=0)
        few.attend(call, BACKEND)
        states = [s for s in call.memory.values() if isinstance(s, State)]
        assert states[1].kept.any(2).all()  # type: ignore[union-attr]  # no query without keys


def test_alike_keys_are_grouped_by_the_answers_they_get() -> None:
    call = call_of(TokenGrid(4, 8, 8), heads=2)
    kinds = torch.randn(32, 2, 16).double()
    which = torch.arange(256).remainder(32)[torch.randperm(256)]
    query, key = call.query.clone(), 4 * kinds[which][None] + 1e-3 * call.key
    query[..., 5] = 0  # what no query asks for does not count
    key[..., 5] = 50 * torch.randn(256, 2)
    call = replace(call, query=query, key=key)
    for head in alike_keys(call, 8):
        assert (which[head.long()].view(-1, 8).diff(dim=1) == 0).all()
    exact, error = dense(call), {}
    for keys in ("order", "alike"):  # all of a group are nearly the same: skipping costs nothing
        method = Metered(mode="pooled", keys=keys, key_block=8, **SMALL)
        error[keys] = float(relative_error(method.attend(call, BACKEND), exact).mean())
    assert error["alike"] < 0.02
    # values still differ within a group, but each enters as it weighs
    assert error["order"] > 10 * error["alike"]


def test_wide_heads_are_cut_along_the_axes_that_matter() -> None:
    kinds, query = torch.randn(1, 8, 1, 96), torch.randn(1, 128, 1, 96)
    which = torch.arange(128).remainder(8)[torch.randperm(128)]
    key = kinds[:, which] + 1e-3 * torch.randn(1, 128, 1, 96)
    call = AttentionCall(query, key, key, TokenGrid(2, 8, 8))
    (found,) = alike_keys(call, 16)
    assert (which[found.long()].view(8, 16).diff(dim=1) == 0).all()


def test_alike_keys_are_sought_at_longer_and_longer_intervals() -> None:
    method = Metered(keys="alike", **SMALL)
    memory: dict[str, Any] = {}
    cuts = []
    for step in (*range(16), 3, 4):
        call = replace(call_of(TokenGrid(3, 6, 7)), memory=memory, step=step)
        method.attend(call, BACKEND)
        cuts.append(chosen(call).cut)
    assert sorted(set(cuts[:16])) == [0, 2, 6, 14]
    assert cuts[16:] == [3, 3]  # another run, which begins behind dense steps
    assert [cut_lasts(2, step) for step in (1, 2, 5, 6)] == [False, True, True, False]
    last = chosen(call).alike
    assert last is not None
    assert last.dtype == torch.int32


def test_new_groups_of_keys_forget_what_the_blocks_before_were_worth() -> None:
    method = Metered(keys="alike", order="fhw", refresh=1e9, **SMALL)
    memory: dict[str, Any] = {}
    kept = []
    for step in range(3):
        call = replace(call_of(TokenGrid(3, 6, 7)), memory=memory, step=step)
        method.attend(call, BACKEND)
        kept.append(chosen(call).kept)
    alone = replace(call, memory={})
    method.attend(alone, BACKEND)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])
    assert torch.equal(kept[2], chosen(alone).kept)  # type: ignore[arg-type]


def test_repair_mends_more_than_pooling_and_pooling_more_than_dropping() -> None:
    grid = TokenGrid(4, 12, 12)
    coarse = torch.randn(48, 3, 2, 3, 3)
    fields = torch.nn.functional.interpolate(coarse, grid.shape, mode="trilinear")
    q, k, v = fields.flatten(2).permute(2, 1, 0)[None].chunk(3, dim=-1)
    call = AttentionCall(q, k, v, grid)
    exact, error = dense(call), {}
    for mode in ("drop", "pooled", "repair"):
        method = Metered(density=0.2, block_size=SIZE, mode=mode)
        out = method.attend(replace(call, memory={}), BACKEND)
        error[mode] = float(relative_error(out, exact).mean())
    assert error["repair"] < 0.9 * error["pooled"] < 0.5 * error["drop"]


def chosen(call: AttentionCall) -> State:
    (state,) = (s for s in call.memory.values() if isinstance(s, State))
    return state


def test_only_heads_whose_error_grew_choose_anew() -> None:
    call = call_of(TokenGrid(3, 6, 7))
    method = Metered(refresh=1.5, **SMALL)
    method.attend(call, BACKEND)
    first = chosen(call).kept
    assert first is not None
    state = chosen(call)
    state.last = state.base * torch.tensor([1.0, 1.6, 1.4])  # type: ignore[operator]
    other = call_of(call.grid)
    method.attend(replace(other, memory=call.memory, step=1), BACKEND)
    again = chosen(call).kept
    assert again is not None
    assert [torch.equal(first[h], again[h]) for h in range(3)] == [True, False, True]
    assert chosen(call).base[1] == chosen(call).last[1]  # type: ignore[index]
    assert chosen(call).base[0] != chosen(call).last[0]  # type: ignore[index]


def test_turns_look_at_every_query_of_a_block_and_begin_in_the_middle() -> None:
    sizes = torch.tensor([SIZE, SIZE, 5])
    turns = torch.stack([slots_amid(sizes, 4, turn) for turn in range(8)])
    assert turns[0].tolist() == [[2, 6, 10, 14]] * 2 + [[0, 1, 3, 4]]
    assert (turns.diff(dim=2) >= 0).all()
    assert [sorted(set(t.flatten().tolist())) for t in turns.unbind(1)] == [
        list(range(SIZE)),
        list(range(SIZE)),
        list(range(5)),
    ]
    assert {n // 4 for n in turns[:, 0, 1].tolist()} == {1}  # each within its part
    assert turns[:5, 0, 0].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("score", ["error", "mass"])
def test_what_earlier_steps_found_counts_half_and_none_without_carry(score: str) -> None:
    call = call_of(TokenGrid(3, 6, 7, 3))
    method = Metered(score=score, order="fhw", rows=2, first_look=1, **SMALL)
    order = padded_order(call.grid, ("fhw",), SIZE)
    runs = pool_runs(call, order, 8, SIZE, 2)
    first, second = (
        method.scores(replace(call, step=t), Blocks(order, None, SIZE, SIZE), runs) for t in (0, 1)
    )
    assert not torch.allclose(first, second, rtol=0.05, atol=0)
    for carry, wanted in ((0.5, second + 0.5 * first.bfloat16()), (0.0, first)):
        some, memory = replace(method, carry=carry), {}
        for step in range(2):
            some.attend(replace(call, step=step, memory=memory), BACKEND)
        (state,) = memory.values()
        assert torch.equal(state.kept, keep_share(wanted, 0.3, True))
        assert state.scores is None if not carry else state.scores.shape == first.shape
        again = some.attend(replace(call, memory=memory), BACKEND)  # a run from its start
        assert torch.equal(state.kept, keep_share(first, 0.3, True))
        if not carry:  # and nothing else is remembered: the parts alone, to the bit
            plain = replace(some, recall=0)
            out = [plain.attend(replace(call, memory={}, step=t), BACKEND) for t in (0, 0)]
            assert torch.equal(*out)
            assert again.shape == out[0].shape


@pytest.mark.parametrize("keys", ["order", "alike"])
def test_blocks_nothing_is_known_of_are_judged_by_more_queries(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    scores = Metered.scores

    def noted(self: Metered, *args: Any) -> torch.Tensor:
        seen.append(args[-1])
        return scores(self, *args)

    monkeypatch.setattr(Metered, "scores", noted)
    call = call_of(TokenGrid(3, 6, 7))
    method = Metered(order="fhw", rows=2, first_look=3, keys=keys, **SMALL)
    for step in (0, 1, 2, 3, 0):  # alike keys are cut anew at 0 and 2; the last begins a new run
        method.attend(replace(call, step=step), BACKEND)
    assert seen == {"order": [3, 1, 1, 1, 3], "alike": [3, 1, 3, 1, 3]}[keys]
    seen.clear()
    replace(method, carry=0.0).attend(replace(call, memory={}), BACKEND)
    assert seen == [1]  # without carry every step looks alike


def test_a_first_look_takes_all_queries_of_a_block_at_most() -> None:
    call = call_of(TokenGrid(3, 6, 7))
    cut = Blocks(padded_order(call.grid, ("fhw",), SIZE), None, SIZE, SIZE)
    method = Metered(order="fhw", rows=SIZE // 2, **SMALL)
    every = replace(method, rows=SIZE).scores(call, cut, cut.runs(call))
    assert torch.equal(method.scores(call, cut, cut.runs(call), 4), every)
    assert not torch.equal(method.scores(call, cut, cut.runs(call)), every)


def test_steps_together_choose_as_well_as_all_queries_of_a_block_at_once() -> None:
    call = call_of(TokenGrid(4, 12, 12), heads=2)
    call = replace(call, query=4 * call.query)  # queries of a block attend to different blocks
    order = padded_order(call.grid, ("fhw",), SIZE)
    cut = Blocks(order, None, SIZE, SIZE)
    exact = Metered(block_size=SIZE, rows=SIZE).scores(call, cut, cut.runs(call))

    def worth(carry: float) -> float:
        call.memory.clear()
        method = Metered(order="fhw", rows=2, carry=carry, mode="pooled", **SMALL)
        for step in range(6):
            method.attend(replace(call, step=step), BACKEND)
        return float(exact[chosen(call).kept].sum() / exact.sum())

    alone, together = worth(0.0), worth(0.8)
    best = float(exact[keep_share(exact, 0.3, True)].sum() / exact.sum())
    assert best - together < 0.5 * (best - alone)


def test_heads_that_keep_their_blocks_keep_what_these_were_worth() -> None:
    call = call_of(TokenGrid(3, 6, 7))
    method = Metered(refresh=1.5, **SMALL)
    method.attend(call, BACKEND)
    before = chosen(call).scores
    state = chosen(call)
    state.last = state.base * torch.tensor([1.0, 1.6, 1.0])  # type: ignore[operator]
    method.attend(replace(call_of(call.grid), memory=call.memory, step=1), BACKEND)
    after = chosen(call).scores
    assert [torch.equal(before[h], after[h]) for h in range(3)] == [True, False, True]  # type: ignore[index]


@pytest.mark.parametrize("per_head", [True, False])
def test_blocks_are_kept_or_chosen_at_every_step_as_asked(per_head: bool) -> None:
    for refresh, same in ((0.0, False), (1e9, True)):
        call = call_of(TokenGrid(3, 6, 7))
        method = Metered(refresh=refresh, per_head=per_head, **SMALL)
        method.attend(call, BACKEND)
        first = chosen(call).kept
        other = replace(call_of(call.grid), memory=call.memory, step=1)
        method.attend(other, BACKEND)
        assert torch.equal(first, chosen(call).kept) is same  # type: ignore[arg-type]


def test_a_head_past_the_limit_gets_the_ceiling_until_it_is_near() -> None:
    call = call_of(TokenGrid(3, 6, 7), heads=2)
    even = call.key.clone()
    even[:, :, 0] = 0  # pooling is exact where all keys are alike
    call = replace(call, key=even)
    method = Metered(refresh=1e9, ceiling=0.8, limit=0.05, mode="pooled", **SMALL)
    for step in range(2):
        method.attend(replace(call, step=step), BACKEND)
    assert chosen(call).kept.sum(dim=(1, 2)).tolist() == [19, 51]  # type: ignore[union-attr]
    calm = call.key.clone()
    calm[:, :, 1] = 0
    for step in range(2, 4):
        method.attend(replace(call, key=calm, step=step), BACKEND)
    assert chosen(call).kept.sum(dim=(1, 2)).tolist() == [19, 19]  # type: ignore[union-attr]


def test_heads_leave_the_dense_start_when_their_error_allows() -> None:
    call = call_of(TokenGrid(3, 6, 7), heads=2, steps=10)
    even = call.key.clone()
    even[:, :, 0] = 0
    call = replace(call, key=even)
    method = Metered(limit=0.05, start=0.3, mode="pooled", **SMALL)
    out = method.attend(call, BACKEND)
    torch.testing.assert_close(out, dense(call), atol=1e-6, rtol=1e-6)  # nothing known yet
    out = method.attend(replace(call, step=1), BACKEND)
    assert chosen(call).held.tolist() == [False, True]  # type: ignore[union-attr]
    torch.testing.assert_close(out, dense(call), atol=1e-6, rtol=1e-6)
    method.attend(replace(call, step=3), BACKEND)
    assert chosen(call).held is None
    assert not torch.allclose(method.attend(replace(call, step=4), BACKEND), dense(call), atol=1e-2)


class Told(ReferenceBackend):
    """Remembers what methods tell the report."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, reason: str) -> None:
        self.told.append(reason)


@pytest.mark.parametrize("keys", ["order", "alike"])
@pytest.mark.parametrize("mode", ["pooled", "repair"])
def test_a_head_with_broken_probe_rows_runs_dense_and_is_named(mode: str, keys: str) -> None:
    call, backend = call_of(TokenGrid(3, 6, 7)), Told()
    method = Metered(mode=mode, keys=keys, **SMALL)
    clean = method.attend(replace(call, memory={}), BACKEND)
    value = call.value.clone()
    value[:, 40, 1] = float("nan")
    broken = replace(call, value=value)
    out = method.attend(broken, backend)
    assert torch.equal(out[:, :, [0, 2]], clean[:, :, [0, 2]])
    assert backend.told == ["metered ran heads dense, their probe rows were not finite: [1]"]
    exact = method.attend(replace(call, step=1), backend)  # stays dense, the value mended
    torch.testing.assert_close(exact[:, :, 1], dense(call)[:, :, 1], atol=1e-6, rtol=1e-6)
    assert len(backend.told) == 1


@pytest.mark.parametrize("keys", ["order", "alike"])
@pytest.mark.parametrize("per_head", [True, False])
def test_clips_of_a_batch_are_what_each_is_alone(per_head: bool, keys: str) -> None:
    both = call_of(TokenGrid(3, 6, 7), batch=2)
    both = replace(both, query=both.query * torch.tensor([1.0, 5.0])[:, None, None, None])
    method = Metered(per_head=per_head, keys=keys, **SMALL)
    alone: list[dict[str, Any]] = [{}, {}]
    for step in range(3):
        moved = replace(both, key=both.key * (1 + step), step=step)
        out = method.attend(moved, BACKEND)
        for item in range(2):
            part = {n: getattr(moved, n)[item : item + 1] for n in ("query", "key", "value")}
            found = method.attend(replace(moved, **part, memory=alone[item]), BACKEND)
            torch.testing.assert_close(out[item : item + 1], found, atol=1e-5, rtol=1e-4)


def test_one_threshold_gives_concentrated_heads_less() -> None:
    call = call_of(TokenGrid(3, 6, 7))
    flat = call.query.clone()
    flat[:, :, 0] *= 0.1
    call = replace(call, query=flat)
    Metered(per_head=False, **SMALL).attend(call, BACKEND)
    counts = chosen(call).kept.sum(dim=(1, 2))  # type: ignore[union-attr]
    assert int(counts.sum()) == round(0.3 * 64 * 3)
    assert counts[0] < counts[1:].min()


def test_orders_may_be_named_for_each_head() -> None:
    call = call_of(TokenGrid(3, 6, 7))
    names = ("fhw", "wfh", "hwf")
    Metered(order=names, **SMALL).attend(call, BACKEND)
    wanted = padded_order(call.grid, names, SIZE).index
    assert torch.equal(chosen(call).order.index, wanted)  # type: ignore[union-attr]
    two = Metered(order=names[:2], **SMALL)
    assert two.not_supported(call) == ["metered lists 2 orders for 3 heads"]
    out = Metered(order="gilbert", **SMALL).attend(replace(call, memory={}), BACKEND)
    assert out.isfinite().all()


def test_fewer_tokens_than_probes_or_than_a_block_are_refused() -> None:
    few = call_of(TokenGrid(1, 4, 8))
    assert "more tokens than probes (32)" in Metered(block_size=8, probes=32).not_supported(few)[0]
    assert "one block (128)" in Metered(block_size=128, probes=8).not_supported(few)[0]
    assert Metered(block_size=8, probes=8).not_supported(few) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"density": 0}, "above 0"),
        ({"mode": "mend"}, "'drop', 'pooled', 'repair'"),
        ({"order": "zyx"}, "'auto', or one of fhw"),
        ({"order": ("auto", "fhw")}, "'auto', or one of fhw"),
        ({"key_block": 48, "block_size": 128}, "0, or a divisor of block_size (128)"),
        ({"key_block": 16}, "0 where block_size is 0"),
        ({"block_size": 7}, "0, or at least 8"),
        ({"key_block": 4}, "at least 8"),
        ({"probes": 4}, "at least 8 with mode='repair'"),
        ({"ceiling": 0.5}, "above 0, with probes"),
        ({"start": 0.2}, "above 0, with probes"),
        ({"probes": 0, "mode": "pooled", "refresh": 1.3}, "0 without probes"),
    ],
)
def test_unusable_parameters_are_one_clear_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="metered: ") as caught:
        Metered(**wrong)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 5, 7), 8), ((12, 12, 12), 32), ((9, 15, 26), 64), ((9, 30, 52), 128)]
)
def test_blocks_of_no_given_size_are_at_least_32_and_no_larger_than_128(
    shape: tuple[int, int, int], size: int
) -> None:
    grid = TokenGrid(*shape)
    fitted = Metered().fitted(grid)
    assert fitted.block_size == size
    assert size == 8 or grid.tokens >= 32 * size
    assert fitted.key_size == size
    alike = Metered(keys="alike").fitted(grid)
    assert alike.key_size == (size // 2 if size > 8 else size)
    given = Metered(block_size=16, key_block=8)
    assert given.fitted(grid) is given


@pytest.mark.parametrize("keys", ["order", "alike"])
def test_a_size_left_open_runs_as_the_one_that_suits_the_grid(keys: str) -> None:
    call = call_of(TokenGrid(3, 12, 9, 2, 5))
    left_open = Metered(density=0.3, keys=keys, probes=16)
    fixed = Metered(density=0.3, keys=keys, probes=16, block_size=8)
    assert left_open.fitted(call.grid) == fixed
    assert torch.equal(
        left_open.attend(call, BACKEND), fixed.attend(replace(call, memory={}), BACKEND)
    )
