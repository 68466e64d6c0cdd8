"""VMoBA: partitions, selection rules with the authors' worked examples, exact execution."""

import math
from dataclasses import replace

import pytest
import torch
from toys import generate

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.key_blocks import _COPIES
from dittools.methods.vmoba import KINDS, VMoBA, block_keys, block_sides, partition, select
from dittools.patches import attach
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch
from dittools.pipelines import tiny

BACKEND = ReferenceBackend()
RULES = ("local_top_k", "global_top_k", "local_threshold", "global_threshold")


def call_of(grid: TokenGrid, layer: int = 0, batch: int = 1) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, 3, 8) for _ in range(3))
    return AttentionCall(q, k, v, grid, layer=layer)


def counted_density(call: AttentionCall, method: VMoBA) -> float:
    """Return the density a report would show for one call."""
    meter = Meter(BACKEND, call, lambda: BACKEND.dense(call), Stopwatch())
    method.attend(call, meter)
    return float(meter.density(call))


def chosen_by_definition(call: AttentionCall, method: VMoBA, item: int) -> torch.Tensor:
    """bool [H, S, S]: the kept blocks of every token, spread to their tokens; text dense."""
    grid = call.grid
    block = method.partition(grid, call.layer)
    count = int(block.max()) + 1
    k = method.top_k if isinstance(method.top_k, int) else max(1, round(method.top_k * count))
    video = slice(grid.text_before, grid.text_before + grid.tokens)
    query, key = call.query[item, video], call.key[item, video]
    means = torch.stack([key[block == c].mean(0) for c in range(count)])  # [C, H, D]
    scores = torch.einsum("shd,chd->hsc", query, means)
    kept = select(scores, block, method.rule, k, method.threshold)
    allowed = torch.ones((3, grid.total, grid.total), dtype=torch.bool)
    allowed[:, video, video] = kept[:, :, block]
    return allowed


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [TokenGrid(6, 4, 5), TokenGrid(5, 7, 9, 4, 3)], ids=str)
def test_gathered_passes_equal_the_masked_softmax(grid: TokenGrid, rule: str, layer: int) -> None:
    call = call_of(grid, layer, batch=2)
    method = VMoBA(rule=rule, block_size=32, spatial=(2, 3), box=(3, 3, 3))
    out = method.attend(call, BACKEND)
    for item in range(2):
        allowed = chosen_by_definition(call, method, item)
        assert not bool(allowed.all())
        q, k, v = (x[item].transpose(0, 1) for x in (call.query, call.key, call.value))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        torch.testing.assert_close(out[item], expected.transpose(0, 1), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("grid", [TokenGrid(6, 4, 5), TokenGrid(5, 7, 9, 4, 3)], ids=str)
def test_the_report_counts_the_kept_pairs(grid: TokenGrid, layer: int) -> None:
    call, method = call_of(grid, layer), VMoBA(block_size=32, spatial=(2, 3), box=(3, 3, 3))
    expected = chosen_by_definition(call, method, 0).double().mean()
    assert counted_density(call, method) == pytest.approx(float(expected), rel=1e-6)


def test_equal_blocks_have_the_published_density() -> None:
    method = VMoBA(top_k=2, temporal=1, spatial=(3, 3), box=(4, 3, 2), block_size=16)
    shares = [counted_density(call_of(TokenGrid(8, 6, 6), layer), method) for layer in range(3)]
    assert shares == pytest.approx([2 / 8, 2 / 4, 2 / 12])  # kept blocks over blocks, per layer


def test_padded_text_keys_stay_out() -> None:
    grid = TokenGrid(4, 6, 6, 0, 8)
    call = call_of(grid)
    kept = torch.ones((1, grid.total), dtype=torch.bool)
    kept[:, -5:] = False
    masked = AttentionCall(call.query, call.key, call.value, grid, key_mask=kept)
    value = call.value.clone()
    value[:, -5:] = 1e4
    poisoned = AttentionCall(call.query, call.key, value, grid, key_mask=kept)
    method = VMoBA(block_size=16)
    assert torch.equal(method.attend(masked, BACKEND), method.attend(poisoned, BACKEND))


def test_token_ids_follow_the_worked_example() -> None:
    grid = TokenGrid(4, 4, 6)
    token = (1 * 4 + 3) * 6 + 4
    cases = [((2, 4, 6), 0, 46, 48), ((4, 2, 3), 3, 10, 24), ((2, 2, 3), 3, 10, 12)]
    for sides, block, slot, size in cases:
        ids = partition(grid, sides)
        inside = (ids == block).nonzero().flatten().tolist()
        assert int(ids[token]) == block
        assert (inside.index(token), len(inside)) == (slot, size)
    first = (partition(grid, (4, 2, 3)) == 0).nonzero().flatten().tolist()
    assert first[:12] == [0, 1, 2, 6, 7, 8, 24, 25, 26, 30, 31, 32]


SCORES = (
    torch.tensor([[9, 7, 1, 2, 3, 0], [2, 8, 6, 5, 1, 4], [0, 3, 2, 9, 7, 8]]).t()[None].float()
)
OWN = torch.tensor([0, 0, 1, 1, 2, 2])


def sets(kept: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in kept[0]]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.25, [{0}, {0}, {1}, {1, 2}, {2}, {2}]),
        (0.5, [{0}, {0}, {1}, {1, 2}, {2}, {2}]),
        (0.75, [{0}, {0, 1}, {1}, {1, 2}, {2}, {2}]),
        (0.9, [{0}, {0, 1, 2}, {1}, {0, 1, 2}, {0, 2}, {1, 2}]),
    ],
)
def test_threshold_rules_keep_what_the_authors_code_keeps(
    threshold: float, expected: list[set[int]]
) -> None:
    assert sets(select(SCORES, OWN, "global_threshold", 1, threshold)) == expected
    local = sets(select(SCORES, OWN, "local_threshold", 1, threshold))
    assert local == [{0, 1}, {0, 1}, {1, 2}, {1, 2}, {0, 2}, {1, 2}]


def test_top_k_counts_the_own_block_and_competes_per_head_when_global() -> None:
    scores = torch.randn(4, 96, 6)
    own = torch.arange(96) // 16
    local = select(scores, own, "local_top_k", 3, 0)
    assert bool((local.sum(-1) == 3).all())
    assert bool(local.gather(-1, own[None, :, None].expand(4, -1, 1)).all())
    assert float(local.float().mean()) == 0.5
    overall = select(scores, own, "global_top_k", 3, 0)
    assert overall.sum((1, 2)).tolist() == [3 * 96] * 4
    assert bool(overall.gather(-1, own[None, :, None].expand(4, -1, 1)).all())
    assert int(overall.sum(-1).min()) < 3


def test_threshold_ignores_scale_and_shift_grows_and_stays_in_its_bounds() -> None:
    own = torch.arange(90) // 10
    for seed in range(20):
        scores = torch.randn(2, 90, 9, generator=torch.Generator().manual_seed(seed))
        last = None
        for threshold in (0.0, 0.1, 0.25, 0.6, 0.95):
            for rule in ("global_threshold", "local_threshold"):
                kept = select(scores, own, rule, 1, threshold)
                assert torch.equal(kept, select(scores * 3 + 5, own, rule, 1, threshold))
            kept = select(scores, own, "global_threshold", 1, threshold)
            assert last is None or bool((kept | ~last).all())
            last, density = kept, float(kept[0].float().mean())
            assert 1 / 9 <= density <= 1 / 9 + threshold * (8 / 9) + 1 / (9 * 90) + 1e-6
        none = select(scores, own, "global_threshold", 1, 0.0)
        assert none.sum((1, 2)).tolist() == [91, 91]  # own blocks and one more
        local = select(scores, own, "local_threshold", 1, 0.0)
        assert bool((local.sum(-1) == 2).all())


@pytest.mark.parametrize(
    ("shape", "blocks", "kept"),
    [((21, 30, 52), (7, 24, 72), (2, 6, 18)), ((21, 45, 80), (7, 40, 36), (2, 10, 9))],
)
def test_published_grids_have_the_published_blocks_and_density(
    shape: tuple[int, int, int], blocks: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    grid, method = TokenGrid(*shape), VMoBA()
    counts = [int(partition(grid, block_sides(grid, method, kind)).max()) + 1 for kind in KINDS]
    assert tuple(counts) == blocks
    assert tuple(max(1, round(0.25 * c)) for c in counts) == kept
    assert sum(k / c for k, c in zip(kept, counts, strict=True)) / 3 == pytest.approx(
        0.2619, abs=1e-4
    )


class Silent:
    """A backend that computes nothing: density needs the masks alone."""

    name = "silent"

    def not_supported(self, call: AttentionCall, mask: object = None) -> list[str]:
        return []

    def dense(self, call: AttentionCall) -> torch.Tensor:
        return torch.zeros_like(call.query)

    def block_sparse(
        self, call: AttentionCall, mask: object, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros_like(call.query)
        return (out, out[..., 0]) if return_lse else out


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_report_counts_the_published_density_on_a_published_grid(layer: int) -> None:
    grid, method = TokenGrid(21, 30, 52), VMoBA()
    q, k, v = (torch.randn(1, grid.total, 1, 4) for _ in range(3))
    call = AttentionCall(q, k, v, grid, layer=layer)
    meter = Meter(Silent(), call, lambda: torch.zeros_like(q), Stopwatch())
    method.attend(call, meter)
    closed = (2 / 7, 6 / 24, 18 / 72)[layer]
    assert float(meter.density(call)) == pytest.approx(closed, rel=1e-9)


def test_early_steps_and_attention_to_text_stay_as_they_were() -> None:
    pipe = tiny.build("wan")
    names = {id(m): name for name, m in pipe.transformer.named_modules()}
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, _: calls.append(names[id(m)]))
        for name, module in pipe.transformer.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    generate(pipe, "wan", num_inference_steps=5)
    stock = list(calls)
    calls.clear()
    with attach(pipe, "vmoba", backend="reference") as handle:
        generate(pipe, "wan", num_inference_steps=5)
        report = handle.report()
    assert calls == stock
    layers = len(report.layers)
    ran = report.calls["sparse"] + sum(report.fallbacks.values())
    assert ran == (5 - math.ceil(0.25 * 5)) * layers * 2  # both branches
    for hook in hooks:
        hook.remove()


def test_layers_cycle_and_every_token_has_one_block_on_any_grid() -> None:
    method = VMoBA(temporal=2, spatial=(3, 4), box=(2, 3, 4))
    grid = TokenGrid(5, 7, 9)
    ids = [method.partition(grid, layer) for layer in range(6)]
    assert all(torch.equal(ids[i], ids[i + 3]) for i in range(3))
    assert [int(i.max()) + 1 for i in ids[:3]] == [3, 9, 27]
    assert all(torch.unique(i).numel() == int(i.max()) + 1 for i in ids)
    wide = partition(grid, block_sides(grid, VMoBA(spatial=(50, 50)), "spatial"))
    assert int(wide.max()) == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_all_blocks_are_dense_and_one_is_its_own_block(pooled: bool) -> None:
    grid = TokenGrid(4, 8, 8)
    call = call_of(grid)
    dense = BACKEND.dense(call)
    for params in ({"top_k": 1.0}, {"top_k": 99}, {"rule": "global_threshold", "threshold": 1.0}):
        assert torch.equal(VMoBA(pooled=pooled, **params).attend(call, BACKEND), dense)
    own = VMoBA(top_k=1, temporal=1, pooled=pooled, block_size=32).attend(call, BACKEND)
    frame = AttentionCall(
        *(x.view(4, 64, 3, 8) for x in (call.query, call.key, call.value)), TokenGrid(1, 8, 8)
    )
    torch.testing.assert_close(own.view(4, 64, 3, 8), BACKEND.dense(frame), atol=3e-6, rtol=1e-5)


def test_order_inside_a_block_does_not_matter() -> None:
    grid = TokenGrid(4, 4, 6)
    call, method = call_of(grid), VMoBA(temporal=2, block_size=16)
    shuffle = torch.cat((torch.randperm(48), 48 + torch.randperm(48)))
    moved = AttentionCall(
        call.query[:, shuffle], call.key[:, shuffle], call.value[:, shuffle], grid
    )
    torch.testing.assert_close(
        method.attend(moved, BACKEND),
        method.attend(call, BACKEND)[:, shuffle],
        atol=3e-6,
        rtol=1e-5,
    )


def test_swapping_two_whole_blocks_swaps_their_results() -> None:
    grid = TokenGrid(4, 4, 6)
    call, method = call_of(grid), VMoBA(top_k=2, temporal=1, block_size=16)
    swap = torch.cat((torch.arange(24, 48), torch.arange(24), torch.arange(48, 96)))
    moved = AttentionCall(call.query[:, swap], call.key[:, swap], call.value[:, swap], grid)
    out = method.attend(call, BACKEND)
    assert not torch.allclose(out, BACKEND.dense(call), atol=1e-2)
    torch.testing.assert_close(method.attend(moved, BACKEND), out[:, swap], atol=3e-6, rtol=1e-5)


def test_a_single_block_is_dense() -> None:
    call = call_of(TokenGrid(1, 6, 7, 2, 3))  # layer 0 cuts time, and there is one frame
    for rule in RULES:
        assert torch.equal(VMoBA(rule=rule).attend(call, BACKEND), BACKEND.dense(call))


def test_copies_of_queries_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(TokenGrid(5, 7, 9, 4, 3), layer=2)
    bias = torch.randn(1, 3, call.grid.total)
    call = replace(call, key_bias=bias)
    whole = {rule: VMoBA(rule=rule, block_size=32).attend(call, BACKEND) for rule in RULES}
    for room in (1, 8 * 300, 8 * 1000):  # a query, some of a head's, some heads at a time
        monkeypatch.setitem(_COPIES, True, room)
        for rule in RULES:
            parts = VMoBA(rule=rule, block_size=32).attend(call, BACKEND)
            torch.testing.assert_close(parts, whole[rule], atol=1e-6, rtol=0)


def test_the_gate_is_chunked_over_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(TokenGrid(6, 4, 5))
    whole = {rule: VMoBA(rule=rule).attend(call, BACKEND) for rule in RULES}
    monkeypatch.setattr("dittools.methods.vmoba._GATE_SCORES", 1)
    monkeypatch.setattr("dittools.methods.vmoba._CACHED_SCORES", 1)
    for rule in RULES:
        assert torch.equal(VMoBA(rule=rule).attend(call, BACKEND), whole[rule])


def test_the_pooled_variant_is_close_when_neighbours_agree() -> None:
    grid = TokenGrid(6, 8, 8, 3, 2)
    call = call_of(grid)
    block = VMoBA().partition(grid, 0)
    code = torch.randn(int(block.max()) + 1, 3, 8) * 3
    query = call.query.clone()
    query[:, 3:-2] = code[block] + 0.01 * query[:, 3:-2]
    same = AttentionCall(query, call.key, call.value, grid)
    exact = VMoBA(block_size=64).attend(same, BACKEND)
    pooled = VMoBA(block_size=64, pooled=True).attend(same, BACKEND)
    torch.testing.assert_close(pooled, exact, atol=3e-6, rtol=1e-5)


def test_block_means_are_means() -> None:
    key, block = torch.randn(10, 2, 4), torch.tensor([0, 1, 1, 2, 0, 1, 2, 2, 0, 1])
    means = block_keys(key, block)
    for c in range(3):
        torch.testing.assert_close(means[:, :, c], key[block == c].mean(0))


@pytest.mark.parametrize(
    "params", [{"top_k": 0}, {"top_k": 1.5}, {"rule": "best"}, {"box": (1, 2)}]
)
def test_bad_parameters_are_refused_by_name(params: dict) -> None:
    with pytest.raises(InputError, match=f"vmoba: {next(iter(params))} is not usable; expected"):
        VMoBA(**params)
