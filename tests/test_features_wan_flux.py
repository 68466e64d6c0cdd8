"""What users combine with a plan on Wan and Flux: offload, low precision, adapters, compilation."""

import copy
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import SPARSE, Spy, Whole, Zeros, generate

from dittools.patches import attach, detach
from dittools.pipelines import tiny

FAMILIES = ("wan", "flux")
CPU = torch.device("cpu")
EVERY_CALL = {"wan": 16, "flux": 8}  # layers x steps x guidance branches of one short run
both_families = pytest.mark.parametrize("name", FAMILIES)
either_order = pytest.mark.parametrize("first", ["before", "after"])


@cache
def stock(name: str) -> torch.Tensor:
    return generate(tiny.build(name), name)


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(kind: str) -> Callable[[Any], None]:
    def enable(pipe: Any) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks
        )

    return enable


def sequential_offload(pipe: Any) -> None:
    import accelerate

    # of the denoiser alone: accelerate cannot move a T5 encoder to the meta device and back
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


OFFLOADS = {
    "model": model_offload,
    "group, by block": group_offload("block_level"),
    "group, by leaf": group_offload("leaf_level"),
    "sequential": sequential_offload,
}


@both_families
@either_order
@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.cell("offload: {kind}", note="hooks run, CPU to CPU; streams need a GPU")
def test_offloading_in_either_order_keeps_every_call(name: str, kind: str, first: str) -> None:
    pipe = tiny.build(name)
    if first == "before":
        OFFLOADS[kind](pipe)
    handle = attach(pipe, Whole(), backend="reference")
    if first == "after":
        OFFLOADS[kind](pipe)
    for generation in (1, 2):  # diffusers resets `forward` after every call
        torch.testing.assert_close(generate(pipe, name), stock(name), atol=2e-5, rtol=2e-5)
        report = handle.report()
        assert report.calls["sparse"] == EVERY_CALL[name] * generation
        assert report.branches == (["cond", "uncond"] if name == "wan" else ["cond"])
    handle.detach()
    assert torch.equal(generate(pipe, name), stock(name))


def fp8(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def int8(pipe: Any) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install torchao"
    )
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def bf16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


PRECISIONS = {"fp8 layerwise casting": fp8, "torchao int8 weights": int8, "bf16": bf16}


@both_families
@either_order
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.cell("{precision}")
def test_a_plan_runs_on_weights_of_low_precision(name: str, precision: str, first: str) -> None:
    alone = tiny.build(name)
    PRECISIONS[precision](alone)
    expected = generate(alone, name)
    assert not torch.equal(expected, stock(name))
    pipe = tiny.build(name)
    if first == "before":
        PRECISIONS[precision](pipe)
    handle = attach(pipe, "dense")
    if first == "after":
        PRECISIONS[precision](pipe)
    assert torch.equal(generate(pipe, name), expected)
    handle = attach(pipe, Whole(), backend="reference")
    tolerance = 3e-2 if precision == "bf16" else 1e-5
    worst = (generate(pipe, name) - expected).abs().max()
    assert worst <= tolerance * expected.abs().max()
    assert handle.report().calls["sparse"] == EVERY_CALL[name]
    handle.detach()
    assert torch.equal(generate(pipe, name), expected)


def lora_of(name: str) -> dict[str, torch.Tensor]:
    """Weights of an adapter on every query projection, named as a downloaded file names them."""
    peft = pytest.importorskip("peft", reason="peft is not installed: make test")
    twin = tiny.build(name).transformer
    twin.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    weights = peft.get_peft_model_state_dict(twin, adapter_name="default")
    return {f"transformer.{key}": value for key, value in weights.items()}


@both_families
@pytest.mark.cell("LoRA")
def test_a_lora_is_loaded_scaled_fused_and_unloaded_while_attached(name: str) -> None:
    pipe, weights, spy = tiny.build(name), lora_of(name), Spy()
    pipe.load_lora_weights(dict(weights), adapter_name="style")
    expected = generate(pipe, name)
    pipe.set_adapters(["style"], [0.5])
    weaker = generate(pipe, name)
    pipe.unload_lora_weights()
    assert not torch.equal(expected, stock(name))

    processors = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    with attach(pipe, spy) as handle:
        pipe.load_lora_weights(dict(weights), adapter_name="style")
        assert torch.equal(generate(pipe, name), expected)
        pipe.set_adapters(["style"], [0.5])
        assert torch.equal(generate(pipe, name), weaker)
        pipe.set_adapters(["style"], [1.0])
        pipe.fuse_lora()
        torch.testing.assert_close(generate(pipe, name), expected, atol=2e-5, rtol=2e-5)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(generate(pipe, name), stock(name), atol=2e-5, rtol=2e-5)
        assert len(spy.seen) == 4 * EVERY_CALL[name]
        assert handle.report().coverage["never_fired"] == {}
    now = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    assert now == processors
    assert not any("_dit_stock" in vars(type(p)) for p in now)


@both_families
@pytest.mark.cell("copy, pickle, save_pretrained")
def test_copies_files_and_pickles(name: str, tmp_path: Path) -> None:
    """A copy stays attached; what is written is the stock model, under the stock keys."""
    pipe = tiny.build(name)
    keys = list(pipe.transformer.state_dict())
    attach(pipe, Zeros(), recorder=False)
    marked = generate(pipe, name)
    assert not torch.equal(marked, stock(name))
    assert list(pipe.transformer.state_dict()) == keys

    twin = copy.deepcopy(pipe.transformer)
    stream = io.BytesIO()
    torch.save(pipe.transformer, stream)
    stream.seek(0)
    pickled = torch.load(stream, weights_only=False)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)

    def swapped(transformer: torch.nn.Module) -> Any:
        made = pipe.__class__(**{**pipe.components, "transformer": transformer})
        made.set_progress_bar_config(disable=True)
        return made

    assert torch.equal(generate(swapped(twin), name), marked)
    for stock_again in (pickled, loaded):
        assert list(stock_again.state_dict()) == keys
        assert torch.equal(generate(swapped(stock_again), name), stock(name))
    detach(swapped(twin))
    assert torch.equal(generate(swapped(twin), name), stock(name))
    assert torch.equal(generate(pipe, name), marked)


def deeper(name: str, layers: int = 10) -> Any:
    """A toy pipeline with more blocks than Dynamo recompiles (8)."""
    pipe = tiny.build(name)
    lists = ["blocks"] if name == "wan" else ["transformer_blocks", "single_transformer_blocks"]
    for blocks in (getattr(pipe.transformer, attribute) for attribute in lists):
        while len(blocks) < layers:
            blocks.append(copy.deepcopy(blocks[0]))
    return pipe


class Counting:
    """A compiler backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


def compile_as(way: str, pipe: Any, backend: Any) -> None:
    if way == "regional":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    elif way == "whole":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    else:
        pipe.transformer.compile(fullgraph=True, backend=backend)


# one graph per kind of block; the first single block of Flux sees inputs of other strides
BLOCK_GRAPHS = {"wan": 1, "flux": 3}
SHORT = {
    "wan": {"num_inference_steps": 2, "guidance_scale": 1.0},
    "flux": {"num_inference_steps": 2},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("wan", "regional"),
        ("wan", "whole"),
        ("wan", "module"),
        ("flux", "regional"),
        ("flux", "whole"),
        pytest.param("flux", "module", marks=pytest.mark.slow),
    ],
)
@pytest.mark.cell("torch.compile, fullgraph: {way}")
def test_compiled_models_stay_one_graph(name: str, way: str) -> None:
    pipe = deeper(name, 10 if way == "regional" else 2)
    eager = generate(pipe, name, **SHORT[name])
    plan: dict[str, Any] = {"dense_steps": 1, "dense_layers": 1, "backend": "reference"}
    with attach(pipe, SPARSE, **plan) as handle:
        expected = generate(pipe, name, **SHORT[name])
        sparse = handle.report().calls["sparse"]
    assert not torch.equal(expected, eager)

    torch._dynamo.reset()
    counting = Counting()
    handle = attach(pipe, SPARSE, **plan)
    compile_as(way, pipe, counting)
    assert torch.equal(generate(pipe, name, **SHORT[name]), expected)
    assert counting.graphs == (BLOCK_GRAPHS[name] if way == "regional" else 1)
    assert handle.report().calls["sparse"] == sparse > 0
    handle.detach()
    assert torch.equal(generate(pipe, name, **SHORT[name]), eager)
    torch._dynamo.reset()


@both_families
@pytest.mark.cell("torch.compile, fullgraph: regional")
def test_a_model_compiled_before_attaching_takes_the_plan_up(name: str) -> None:
    pipe = deeper(name)
    with attach(pipe, SPARSE, backend="reference"):
        expected = generate(pipe, name, **SHORT[name])
    torch._dynamo.reset()
    counting = Counting()
    compile_as("regional", pipe, counting)
    eager = generate(pipe, name, **SHORT[name])
    before = counting.graphs
    assert before == BLOCK_GRAPHS[name]  # as many as with a plan
    with attach(pipe, SPARSE, backend="reference"):
        assert torch.equal(generate(pipe, name, **SHORT[name]), expected)
    assert counting.graphs <= 2 * before
    assert torch.equal(generate(pipe, name, **SHORT[name]), eager)
    torch._dynamo.reset()


@pytest.mark.slow
@both_families
@pytest.mark.parametrize("way", ["regional", "whole"])
@pytest.mark.cell("torch.compile with Inductor: {way}")
def test_inductor_equals_eager(name: str, way: str) -> None:
    pipe = deeper(name, 3)
    plan: dict[str, Any] = {"dense_steps": 1, "backend": "reference"}
    with attach(pipe, SPARSE, **plan) as handle:
        expected = generate(pipe, name, **SHORT[name])
        calls = handle.report().calls
    torch._dynamo.reset()
    compile_as(way, pipe, "inductor")
    with attach(pipe, SPARSE, **plan) as handle:
        made = generate(pipe, name, **SHORT[name])
        assert handle.report().calls == calls
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
