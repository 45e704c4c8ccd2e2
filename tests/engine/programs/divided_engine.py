"""Engines on several devices against an engine on one: the same tokens; prints "equal" at the end.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.engine.programs.divided_engine in_8_bits

With `deterministic` as a second argument, devices add up in order. The number of devices is fixed when JAX starts.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax import Engine, EngineConfig, Research, SamplingParams
from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.engine import kept_forms, machine
from fastgen_jax.engine.footprint import weight_bytes
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import kept_by_snapshot, prepare_leaf, snapshot_leaf
from fastgen_jax.models.columns import deal_columns
from fastgen_jax.models.config import FullHeads
from fastgen_jax.models.division import divided as divided_model
from fastgen_jax.models.division import divided_parts
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.params import all_specs, init_params
from fastgen_jax.models.sharding import TENSOR, tensor_mesh
from pallas_kernels import gpu_target
from pallas_kernels.matmul import Division, Float8Weight, Int4Weight, Int8Weight, halves, linear, quantize_int8
from pallas_kernels.matmul.weights import unscaled
from tests.adapters import random_lora
from tests.checkpoint.quantized_files import write_fp8
from tests.checkpoint.tiny_files import write_gguf
from tests.engine.test_blocks import TOKENIZER
from tests.engine.test_images import MESSAGES
from tests.models.parity import load
from tests.models.vision.reference import GEMMA3, NUM_GREEDY, QWEN, answer, pictures
from tests.pallas_kernels.matmul.random_blocks import random_blocks
from tests.text.vocabularies import write_json
from tests.tiny import HOME, drain, greedy, tiny_model, tokens_of

PROMPTS = [np.random.default_rng(size).integers(3, 60, size).tolist() for size in (1, 5, 21, 34)]
SAMPLED = SamplingParams(max_new_tokens=6, temperature=1.5, seed=5, ignore_eos=True, repetition_penalty=1.3)
SMALL: dict[str, Any] = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}


def tokens(params: Any, model: Any, **options: Any) -> list[list[int]]:
    engine = Engine(params, model, EngineConfig(**SMALL, **options))
    if "tensor_parallel" in options:
        cache = engine.runner.kv_cache.k
        for array in (cache.values if "kv_dtype" in options else cache, engine.runner.params["embed"]):
            assert array.addressable_shards[0].data.size * options["tensor_parallel"] == array.size
    ids = [engine.add(prompt, params) for params in (greedy(6), SAMPLED) for prompt in PROMPTS]
    outputs = drain(engine)
    assert engine.metrics.compiles_while_serving == 0
    research = Research(engine)
    research.put(["a"], [PROMPTS[1]])
    research.fork("a", "b")
    logits = research.put(["a", "b", "as a", "as b"], [[5], [7], [*PROMPTS[1], 5], [*PROMPTS[1], 7]])
    np.testing.assert_allclose(logits[:2], logits[2:], atol=1e-5)  # one row and six rows use different tiles of a product
    return [tokens_of(outputs[request_id]) for request_id in ids]


def in_8_bits() -> None:
    """Weights and cache in 8 bits, and weights that are sharded while they are loaded."""
    params, model = tiny_model("default")
    options: dict[str, Any] = {"quantize": "int8", "kv_dtype": "int8"}
    resolved = resolve(EngineConfig(**SMALL, **options, tensor_parallel=2), model)
    loaded = load_params(
        open_checkpoint(HOME / "default"),
        dtype="float32",
        stack_layers=True,
        prepare=lambda spec, array: prepare_leaf(spec, array, model, resolved),
    )
    assert tokens(loaded, model, **options, tensor_parallel=2) == tokens(params, model, **options, stack_layers=True)
    in_blocks_of_8_bit_floats()


def in_blocks_of_8_bit_floats() -> None:
    """A device has the scales of its own inputs, or all scales of its own outputs; what ends within a block is rounded."""
    model = replace(tiny_model("default")[1], embed_dim=256, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=320)
    config: Any = SimpleNamespace(
        num_adapters=0,
        dtype="float32",
        activation_dtype="float32",
        quantize="fp8",
        packed_weights=False,
        tensor_parallel=2,
        kept_forms={},
    )
    for name, in_blocks in {"layers.qkv": True, "layers.o": True, "layers.down": False}.items():
        spec = all_specs(model)[name]
        size = 128 if in_blocks else 64
        stored = random_blocks(*spec.shape, size, "float8_e4m3fn", False, "float32")
        leaf: Any = prepare_leaf(spec, stored, model, config)
        assert leaf.in_blocks == in_blocks, name
        values = unscaled(leaf, leaf.values, leaf.scales) * (1 if in_blocks else leaf.scales)
        exact = deal_columns(stored.dequantize(), divided_parts(spec, model, 2), 2) if spec.parts else stored.dequantize()
        assert np.abs(values[: len(exact)] - exact).max() <= (0 if in_blocks else 2.0**-4 * np.abs(exact).max()), name
        parts = {part.data.shape for part in leaf.scales.addressable_shards}
        share = (leaf.scales.shape[0], leaf.scales.shape[-1] // 2) if name == "layers.qkv" else (2, 256)
        assert parts == {share if in_blocks else leaf.scales.shape}, name


def rounded_activations() -> None:
    """Rows of activations in int8: each device rounds its part of a row by itself, and the sums are added in float32."""
    mesh = tensor_mesh(jax.devices()[:2])
    x, w = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((5, 64), (64, 32)))
    values, scales = map(jnp.asarray, quantize_int8(w))
    weight = Int8Weight(values=values, scales=scales, rounds_rows=True)
    halves = (replace(weight, values=part) for part in jnp.split(values, 2))
    expected = sum(linear(jnp.asarray(part), half) for part, half in zip(np.split(x, 2, axis=1), halves, strict=True))
    for of_inputs, wanted in ((True, expected), (False, linear(jnp.asarray(x), weight))):
        divided = replace(weight, division=Division(mesh=mesh, axis=TENSOR, of_inputs=of_inputs))
        np.testing.assert_allclose(jax.jit(linear)(x, divided), wanted, rtol=1e-5, atol=1e-5)
        stack = jax.tree.map(lambda part: part[None], divided)
        np.testing.assert_allclose(jax.jit(linear)(x, stack.at_layer(0)), wanted, rtol=1e-5, atol=1e-5)
    machine.multiplies_int8 = lambda device: True
    params, model = tiny_model("default")
    engine = Engine(params, model, EngineConfig(**SMALL, quantize="w8a8", tensor_parallel=2))
    layers: Any = engine.params["layers"]
    assert all(layers[name].rounds_rows for name in ("qkv", "o", "gate_up", "down"))
    one, other = Research(engine).put(["a", "b"], [PROMPTS[1], PROMPTS[1]])
    np.testing.assert_allclose(one, other, atol=1e-5)


def in_halves() -> None:
    """int8 weights with their inputs last, as a T4 stores them: each device makes halves of its part of a row."""
    mesh = tensor_mesh(jax.devices()[:2])
    x, w = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((5, 64), (64, 32)))
    values, scales = map(jnp.asarray, quantize_int8(w))
    plain = linear(jnp.asarray(x), Int8Weight(values=values, scales=scales))
    weight = Int8Weight(values=values.T, scales=scales, inputs_last=True)
    for of_inputs in (True, False):
        divided = replace(weight, division=Division(mesh=mesh, axis=TENSOR, of_inputs=of_inputs))
        np.testing.assert_allclose(jax.jit(linear)(x, divided), plain, atol=1e-3)
        stack = jax.tree.map(lambda part: part[None], divided)
        np.testing.assert_allclose(jax.jit(linear)(x, stack.at_layer(0)), plain, atol=1e-3)
    params, model = tiny_model("default")
    logits = []
    for capability in ("8.0", halves.CAPABILITY):
        gpu_target.compute_capability = lambda known=capability: known
        engine = Engine(params, model, EngineConfig(**SMALL, quantize="int8", tensor_parallel=2))
        layers: Any = engine.params["layers"]
        wanted = capability == halves.CAPABILITY
        assert all(layers[name].inputs_last == wanted for name in ("qkv", "o", "gate_up", "down"))
        parts = {part.data.shape for part in layers["o"].values.addressable_shards}
        num_layers, depth, columns = layers["o"].shape
        assert parts == {(num_layers, columns, depth // 2) if wanted else (num_layers, depth // 2, columns)}
        logits.append(Research(engine).put(["a"], [PROMPTS[1]]))
    np.testing.assert_allclose(*logits, atol=1e-3 * np.abs(logits[0]).max())


def in_4_bits() -> None:
    """Numbers of 4 bits of a file, which each device has its part of; and experts, filled up before they are quantized."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
        values = write_gguf(path, kind="Q4_1", arrays=TOKENIZER, **sizes)
        answers = []
        for num_devices in (1, 2):
            engine = Engine.from_pretrained(path, **SMALL, quantize="int4", tensor_parallel=num_devices)
            layers = engine.params["layers"]
            assert all(isinstance(layers[name], Int4Weight) for name in ("qkv", "o", "gate_up", "down"))
            o = layers["o"]
            assert o.values.addressable_shards[0].data.size * num_devices == o.values.size
            assert o.scales.addressable_shards[0].data.size * num_devices == o.scales.size
            step = np.abs(values["model.layers.1.self_attn.o_proj.weight"]).max() / 7
            np.testing.assert_allclose(o.dequantize()[1], values["model.layers.1.self_attn.o_proj.weight"].T, atol=step)
            answers.append([engine.add(prompt, greedy(6)) for prompt in PROMPTS])
            answers[-1] = [tokens_of(output) for output in drain(engine).values()]
        assert answers[0] == answers[1]
        as_in_the_file(path, Path(folder) / "snapshot")
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_dim=96, layers=(0, 1, 2), shared_dim=128)
    model = replace(tiny_model("default")[1], embed_dim=64, moe=moe)
    params = init_params(model, jax.random.key(0))
    one, two = (tokens(params, model, quantize="int4", tensor_parallel=number) for number in (1, 2))
    assert one == two


def as_in_the_file(path: Path, out: Path) -> None:
    """By default, as on an accelerator with a kernel; and from a snapshot of the file."""
    checkpoint = open_checkpoint(path)
    prepare = partial(snapshot_leaf, dtype="float32", quantize=None)
    convert(checkpoint, out, prepare=prepare, keep_blocks=kept_by_snapshot(checkpoint, None))
    answers = []
    of_hopper = mock.patch.object(machine, "int4_kernel", return_value="hopper")
    with of_hopper, mock.patch.object(kept_forms, "int4_fits", return_value=True):
        for source, num_devices in ((path, 1), (path, 2), (out, 2)):
            engine = Engine.from_pretrained(source, **SMALL, tensor_parallel=num_devices)
            assert engine.config.quantize is None
            for name in ("qkv", "o", "gate_up", "down"):
                leaf = engine.params["layers"][name]
                assert isinstance(leaf, Int4Weight)
                assert leaf.values.addressable_shards[0].data.size * num_devices == leaf.values.size
            for prompt in PROMPTS:
                engine.add(prompt, greedy(6))
            answers.append([tokens_of(output) for output in drain(engine).values()])
    assert answers[0] == answers[1] == answers[2]


def in_8_bit_floats_of_a_file() -> None:
    """8-bit floats of a checkpoint with one scale for each matrix, and in blocks, of which each device has its part."""
    of_hopper = mock.patch.object(machine, "multiplies_float8", return_value=True)
    kernel = mock.patch.object(machine, "int4_kernel", return_value="hopper")
    for block in (None, 128):
        answers = []
        with tempfile.TemporaryDirectory() as folder, of_hopper, kernel:
            path = write_json(write_fp8(Path(folder), block))
            for num_devices in (1, 2):
                engine = Engine.from_pretrained(path, **SMALL, tensor_parallel=num_devices)
                for name in ("qkv", "o", "gate_up", "down"):
                    leaf = engine.params["layers"][name]
                    assert isinstance(leaf, Float8Weight)
                    assert leaf.in_blocks == (block is not None)
                    assert leaf.values.addressable_shards[0].data.size * num_devices == leaf.values.size
                held = sum(part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(engine.params))
                assert held == weight_bytes(engine.model, num_devices, 4, kept=engine.config.kept)
                requests = [engine.add(prompt, greedy(6)) for prompt in PROMPTS]
                outputs = drain(engine)
                answers.append([tokens_of(outputs[request]) for request in requests])
        assert answers[0] == answers[1]


def tied_embeddings() -> None:
    params, model = tiny_model("multi_head_tied")
    assert tokens(params, model, tensor_parallel=4) == tokens(params, model)


def experts() -> None:
    """Routed and shared experts; biases and a clamped activation."""
    for family in ("qwen2_moe", "gpt_oss"):
        checkpoint = open_checkpoint(HOME.parent / "families" / family / "default")
        params = load_params(checkpoint, dtype="float32")
        assert tokens(params, checkpoint.config, tensor_parallel=2) == tokens(params, checkpoint.config), family


def two_sizes_of_heads() -> None:
    """Repeated KV heads, keys of other layers, experts, and rows of the cache that layers share."""
    for variant in ("default", "experts"):
        params, model = load("gemma4", variant)
        assert tokens(params, model, tensor_parallel=2) == tokens(params, model), variant
    model = replace(model, num_heads=8, num_kv_heads=8, full_heads=FullHeads(num_kv_heads=2, head_dim=16))
    assert divided_model(model, 2).layers_sharing_row(1) == 2
    params = init_params(model, jax.random.key(0))
    assert tokens(params, model, tensor_parallel=2) == tokens(params, model), "shared rows"


def uneven() -> None:
    """Numbers of devices that divide neither heads nor MLP nor vocabulary: 4 query heads, 1 or 2 KV heads, 64 tokens."""
    for family, variant, num_devices, options in (
        ("falcon", "7b", 4, {}),
        ("deepseek_v2", "lite", 3, {"quantize": "int8"}),
        ("gpt_oss", "default", 3, {}),
        ("olmo2", "default", 3, {"kv_dtype": "int8"}),
    ):
        checkpoint = open_checkpoint(HOME.parent / "families" / family / variant)
        params, model = load_params(checkpoint, dtype="float32"), checkpoint.config
        divided = tokens(params, model, **options, tensor_parallel=num_devices)
        assert divided == tokens(params, model, **options, stack_layers=True), (family, variant)


def replaced() -> None:
    """New weights for an engine whose weights have another shape than those of the model: plain, and its own."""
    params, model = tiny_model("default")
    engine = Engine(params, model, EngineConfig(**SMALL, tensor_parallel=3))
    assert engine.params["layers"]["qkv"].shape[-1] > params["layers"][0]["qkv"].shape[-1]
    answers = []
    for new in (None, params, engine.params):
        if new is not None:
            engine.update_params(new)
        engine.add(PROMPTS[2], greedy(6))
        answers += [tokens_of(outputs) for outputs in drain(engine).values()]
    assert answers[0] == answers[1] == answers[2]


def adapters() -> None:
    """Requests of several adapters and of none in one batch, on numbers of devices that divide the model and that do not."""
    for family, variant in (("llama", "default"), ("deepseek_v2", "lite"), ("gpt2", "default")):
        params, model = load(family, variant)
        answers = []
        for num_devices in (None, 2, 3):
            if num_devices is not None and num_devices > model.num_heads:
                continue
            config = EngineConfig(**SMALL, max_adapters=3, max_adapter_rank=4, tensor_parallel=num_devices)
            engine = Engine(params, model, config)
            for number in range(3):
                engine.load_adapter(f"a{number}", random_lora(model, number, rank=2 + number), scale=0.5)
            names = (None, "a0", "a1", "a2")
            ids = [engine.add(prompt, greedy(6, adapter=name)) for prompt in PROMPTS[:3] for name in names]
            outputs = drain(engine)
            answers.append([tokens_of(outputs[request_id]) for request_id in ids])
            assert len({*map(tuple, answers[-1])}) > len(ids) // 2, "the adapters change the answers"
        assert all(answer == answers[0] for answer in answers), family


def states() -> None:
    """States of every kind, and attention beside them; the cache is too small, so that requests are preempted."""
    for family, variant in (
        ("granitemoehybrid", "experts"),
        ("qwen3_next", "dense_first"),
        ("lfm2", "bias"),
        ("falcon_h1", "norm"),
        ("nemotron_h", "default"),
    ):
        params, model = load(family, variant)
        answers = []
        for num_devices in (None, 2):
            engine = Engine(params, model, EngineConfig(**SMALL | {"num_blocks": 18}, tensor_parallel=num_devices))
            ids = [engine.add(prompt, greedy(8)) for prompt in PROMPTS]
            outputs = drain(engine)
            assert engine.scheduler.stats.num_preemptions, "the cache was meant to be too small"
            assert engine.metrics.compiles_while_serving == 0
            answers.append([tokens_of(outputs[request_id]) for request_id in ids])
        for array in engine.runner.kv_cache.states.values():
            assert array.addressable_shards[0].data.size * 2 == array.size
        assert answers[0] == answers[1], family


def images() -> None:
    """Prompts with two images: of one size, of any sizes, and of a tower that adds to the first layers, with experts."""
    settings = SMALL | {"token_budget": 24, "num_blocks": 128, "background_compile": False}
    for model in (GEMMA3, *QWEN[1:]):
        shown = pictures(model)
        answers = []
        for num_devices in (None, 2):
            engine = Engine.from_pretrained(model, **settings, tensor_parallel=num_devices)
            ids = [engine.add(MESSAGES, greedy(NUM_GREEDY), images=order) for order in (shown, shown[::-1])]
            outputs = drain(engine)
            assert engine.metrics.compiles_while_serving == 0
            answers.append([tokens_of(outputs[request_id]) for request_id in ids])
        assert answers[0] == answers[1], model.name
        assert answers[0][0] == answer(model), model.name


if __name__ == "__main__":
    functions = (
        in_8_bits,
        rounded_activations,
        in_halves,
        in_4_bits,
        in_8_bit_floats_of_a_file,
        tied_embeddings,
        experts,
        two_sizes_of_heads,
        uneven,
        states,
        replaced,
        adapters,
        images,
    )
    if "deterministic" in sys.argv[2:]:
        SMALL["deterministic"] = True
    {function.__name__: function for function in functions}[sys.argv[1]]()
    print("equal")
