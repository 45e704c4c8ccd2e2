"""`fastgen plan`: its estimates against numbers computed by hand, and its advice when a model does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fastgen_jax.cli import main
from fastgen_jax.devices import DEVICES, GIB, parse_topology
from fastgen_jax.engine.footprint import weight_bytes
from fastgen_jax.plan.estimate import read_weight_bytes
from fastgen_jax.plan.hlo import (
    copied_weights,
    count_in_loops,
    layer_kernels,
    layer_products,
    operations_of_inner_loops,
    operations_per_layer,
    waits,
)
from fastgen_jax.plan.program import matrix_shapes
from fastgen_jax.plan.report import Plan, make_plan, table
from pallas_kernels.matmul import Int4Weight
from tests.checkpoint.tiny_files import write_gguf
from tests.gate.models import LLAMA_3_8B, LLAMA_3_70B, MIXTRAL_8X7B

VOCAB_OF_EIGHT = 16_064  # rows of Llama 3's embedding on each of eight devices: a multiple of 64
REFERENCE = Path(__file__).parents[1] / "reference"


def plan(config: dict, topology: str, **changes) -> Plan:
    options = {"context": 8192, "budgets": [64, 512], "max_num_seqs": 64, "block_size": 128, "dtype": "bfloat16"}
    return make_plan(config, topology=topology, compile=False, **(options | changes))


def test_llama_3_8b_on_eight_v5e_chips() -> None:
    made = plan(LLAMA_3_8B, "v5e:2x4")
    norms = 65 * 4096  # on every device; everything else is divided by eight
    assert made.num_params == 8_030_261_248
    padding = 2 * (VOCAB_OF_EIGHT - 128_256 // 8) * 4096  # of embedding and head
    assert made.memory.weights == ((made.num_params - norms) // 8 + norms + padding) * 2
    assert made.memory.block == 128 * 2 * 32 * 1 * 128 * 2  # tokens, K and V, layers, one of eight KV heads, D, bytes
    assert made.memory.num_blocks == made.memory.free // made.memory.block
    assert made.sequences == made.memory.num_blocks // 64
    assert made.fits
    assert not made.advice


def test_a_step_is_bound_by_memory_when_few_tokens_share_the_weights() -> None:
    small, large = plan(LLAMA_3_8B, "v6e:2x2", context=1024, budgets=[64, 2048], max_num_seqs=32).steps
    assert (small.bound, large.bound) == ("memory", "compute")
    assert small.memory > 8.03e9 * 2 / 4 / 1.64e12  # the weights alone
    products = 8_030_261_248 - 128256 * 4096 * 2  # without embedding and head
    assert large.compute > 2 * products * 2048 / 4 / 918e12
    # Matrix products and attention each take the longer of arithmetic and memory, one after the other.
    assert max(large.compute, large.memory) + large.links < large.seconds < large.compute + large.memory + large.links


def test_a_model_that_does_not_fit_comes_with_advice() -> None:
    made = plan(LLAMA_3_70B, "v5e:2x4")
    assert not made.fits
    assert made.sequences == made.largest_budget == 0
    assert any("v6e" in line for line in made.advice)
    assert "it does not fit" in table(made)
    one = plan(LLAMA_3_8B, "v5e:1x1")
    assert any(line == "2 devices of v5e instead of 1" for line in one.advice)


@pytest.mark.parametrize(("head_dim", "stored"), [(32, 64), (64, 64), (80, 128), (128, 128), (192, 256)])
def test_heads_of_up_to_64_are_stored_as_64_on_a_tpu_and_others_as_a_multiple_of_128(head_dim: int, stored: int) -> None:
    config = LLAMA_3_8B | {"hidden_size": 2048, "head_dim": head_dim}
    on_tpu, on_gpu = (plan(config, topology, context=1024).memory.block for topology in ("v5e:2x2", "h100:4"))
    assert on_tpu * head_dim == stored * on_gpu


def test_an_8_bit_cache_uses_one_byte_per_number_and_four_per_head() -> None:
    made = plan(LLAMA_3_8B, "v5e:2x4", kv_dtype="int8")
    assert made.memory.block == 128 * 2 * 32 * 1 * (128 + 4)
    wide = plan(LLAMA_3_8B, "v5e:2x4")
    assert made.steps[0].memory < wide.steps[0].memory
    assert made.memory.weights == wide.memory.weights


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", r"topology is 'v9:2x2'; it must be a kind among v4, v5e"),
        ("v5e:2xtwo", r"topology is 'v5e:2xtwo'"),
        ("v5e:8x8", r"32 attention heads cannot be divided over 64 devices: .* choose at most 32 devices"),
    ],
)
def test_an_unknown_or_unsuitable_topology_is_rejected(topology: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(LLAMA_3_8B, topology)


def test_a_kv_head_that_devices_share_is_in_the_cache_of_each() -> None:
    whole, repeated = plan(LLAMA_3_8B, "v5e:2x4"), plan(LLAMA_3_8B, "v5e:4x4")
    assert repeated.memory.block == whole.memory.block
    assert repeated.memory.weights < 0.6 * whole.memory.weights


def test_topologies_count_jax_devices() -> None:
    assert [parse_topology(name).num_devices for name in ("v5e:2x4", "v4:2x2x1", "tpu7x:2x2x1", "h100:8", "v5e")] == [
        8,
        4,
        8,
        8,
        1,
    ]
    assert parse_topology("v5p:2x2").shape == (2, 2, 1)
    assert [parse_topology(name).shape for name in ("v6e", "tpu7x", "h100")] == [(1, 1), (1, 1, 1), (1,)]
    assert parse_topology("v6e:2x2").device.memory_bytes == 32 * GIB


def test_collectives_are_counted_in_the_computations_that_a_loop_calls() -> None:
    hlo = """
%sparsecore (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8] all-reduce(%p), to_apply=%add
}
%body (p: f32[8]) -> f32[8] {
  %a = f32[8] all-reduce-start(%p), to_apply=%add
  %b = f32[8] all-reduce-done(%a)
  %c = ((f32[8]), f32[8]) call-start(%b), async_execution_thread="sparsecore", to_apply=%sparsecore
  ROOT %d = f32[8] call-done(%c), to_apply=%sparsecore
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %g = f32[16] all-gather(%p)
  ROOT %w = f32[8] while(%p), condition=%condition, body=%body
}
"""
    assert count_in_loops(hlo) == 2


def test_products_have_the_types_of_their_operands_after_conversions() -> None:
    hlo = """
%product (x: s8[8,64], w: s8[64,32]) -> s32[8,32] {
  %x = s8[8,64] parameter(0)
  %w = s8[64,32] parameter(1)
  ROOT %p = s32[8,32] convolution(%x, %w), dim_labels=bf_io->bf
}
%converted (x: bf16[8,64], w: s8[64,32]) -> f32[8,32] {
  %x = bf16[8,64] parameter(0)
  %w = s8[64,32] parameter(1)
  %c = bf16[64,32] convert(%w)
  ROOT %p = f32[8,32] convolution(%x, %c), dim_labels=bf_io->bf
}
%body (p: (s8[8,64], s8[64,32])) -> (s8[8,64], s8[64,32]) {
  %p = (s8[8,64], s8[64,32]) parameter(0)
  %x = s8[8,64] get-tuple-element(%p), index=0
  %w = s8[64,32] get-tuple-element(%p), index=1
  %f = s32[8,32] fusion(%x, %w), kind=kOutput, calls=%product
  %g = f32[8,32] fusion(%x, %w), kind=kOutput, calls=%converted
  %grouped_matmul.1 = f32[8,32] custom-call(%g, %x, %w), custom_call_target="tpu_custom_call"
  ROOT %t = (s8[8,64], s8[64,32]) tuple(%x, %w)
}
ENTRY %main (p: (s8[8,64], s8[64,32])) -> (s8[8,64], s8[64,32]) {
  ROOT %w = (s8[8,64], s8[64,32]) while(%p), condition=%condition, body=%body
}
"""
    assert layer_products(hlo) == [("bf16", "bf16"), ("s8", "s8")]
    assert layer_kernels(hlo, "grouped_matmul") == [("f32", "s8", "s8")]
    assert layer_kernels(hlo, "ragged_attention") == []


PROGRAM = """
%fused (p: bf16[8,4096,3584]) -> bf16[1,4096,3584] {
  ROOT %inside = bf16[1,4096,3584]{2,1,0} dynamic-slice(%p, %i)
}
%branch (p: f32[64]) -> f32[64] {
  ROOT %b = f32[64]{0} negate(%p)
}
%body (p: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[1,4096,3584]{1,2,0:T(8,128)(2,1)} copy(%slice), metadata={op_name="slice"}
  %s = ((bf16[8,4096,3584]{2,1,0}, s32[]), bf16[1,4096,3584]{2,1,0}, u32[]) fusion-start(%p), calls=%fused
  %e = bf16[1,4096,3584]{2,1,0} fusion-done(%s)
  %f = bf16[4096,3584]{1,0:T(8,128)(2,1)S(1)} copy(%e)
  %g = f32[512,4096]{1,0} custom-call(%f), custom_call_target="gemm"
  ROOT %c = (f32[64]{0}, f32[64]{0}, u32[]) copy-start(%b)
}
%search (p: s32[8]) -> s32[8] {
  ROOT %r = s32[8] add(%p, %p)
}
ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %d = bf16[8,3584,4224]{2,1,0} pad(%p)
  %x = s32[8] while(%p), condition=%condition, body=%search
  %y = f32[64] conditional(%flag, %p, %p), branch_computations={%branch, %branch}
  ROOT %w = bf16[8,4] while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
}
"""


def test_weights_that_are_copied_in_a_loop_or_outside_are_detected() -> None:
    shapes = {(4096, 3584), (8, 4096, 3584), (4100, 3584), (8, 4100, 3584)}
    size = 4096 * 3584 * 2
    # The slice of a fusion that is named, a copy in another layout, a padded stack; but not what goes into VMEM
    # or, on a v4, into its common memory.
    expected = {("a", size, 8), ("e", size, 8), ("d", 8 * 4224 * 3584 * 2, 1)}
    assert set(copied_weights(PROGRAM, shapes)) == expected
    assert set(copied_weights(PROGRAM.replace("S(1)", "S(3)"), shapes)) == expected
    assert ("f", size, 8) in copied_weights(PROGRAM.replace("S(1)", "S(5)"), shapes)
    assert copied_weights(PROGRAM.replace("%a = bf16", "%a = f8e4m3fn"), shapes)[-1].bytes == size // 2
    assert ("a", size, 8) in copied_weights(PROGRAM, {(4096, 3581)})  # padded to a multiple of 8
    assert copied_weights(PROGRAM, {(512, 28672)}) == []


@pytest.mark.parametrize(
    ("result", "times"),
    [
        ("bf16[64,2880,720]{2,1,0} copy(%p)", 1),  # of all layers, before the loop
        ("bf16[64,2880,768]{2,1,0} pad(%p, %zero)", 1),
        ("bf16[1,32,2880,720]{3,2,1,0} dynamic-slice(%p, %i)", 8),  # of a layer, in the loop
        ("f32[720,32,2880]{2,1,0} convert(%p)", 8),
    ],
)
def test_copies_of_experts_are_detected(result: str, times: int) -> None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stack = jax.ShapeDtypeStruct((2, 32, 2880, 720), jnp.bfloat16, sharding=place)
    inside, outside = (f"  %copied = {result}\n" if times == n else "" for n in (8, 1))
    hlo = f"""
%body (p: bf16[8,4]) -> bf16[8,4] {{
{inside}  ROOT %r = bf16[8,4] negate(%p)
}}
ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {{
{outside}  ROOT %w = bf16[8,4] while(%p), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"8"}}}}
}}
"""
    copies = copied_weights(hlo, matrix_shapes({"layers": {"expert_gate_up": stack}}, 512))
    assert [(copy.name, copy.times) for copy in copies] == [("copied", times)]


@pytest.mark.parametrize(
    "result",
    [
        "u8[1,1440,5760]{2,1,0} dynamic-slice(%p, %i)",
        "bf16[2880,5760]{1,0} fusion(%p)",
        "s8[45,2,32,5760]{3,2,1,0} concatenate(%p, %q)",
    ],
)
def test_copies_of_int4_are_detected_before_and_after_they_are_dequantized(result: str) -> None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    values, scales = (
        jax.ShapeDtypeStruct((2, rows, 5760), dtype, sharding=place)
        for rows, dtype in ((1440, jnp.uint8), (90, jnp.float16))
    )
    stack = Int4Weight(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (shapes)
    program = f"ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {{\n  %copied = {result}\n  ROOT %r = bf16[8,4] negate(%p)\n}}\n"
    (copy,) = copied_weights(program, matrix_shapes({"layers": {"gate_up": stack}}, 512))
    assert copy.name == "copied"


def test_the_operations_of_a_layer_and_what_the_host_waits_for_are_counted() -> None:
    assert operations_per_layer(PROGRAM) == 5  # not the end of the fusion
    assert operations_of_inner_loops(PROGRAM) == 0
    known = 'backend_config={"known_trip_count":{"n":"6"}}'
    nested = PROGRAM.replace("  %g = ", f"  %n = s32[8] while(%f), condition=%condition, body=%search, {known}\n  %g = ")
    assert (operations_per_layer(nested), operations_of_inner_loops(nested)) == (6, 6)
    assert operations_of_inner_loops(nested.replace(known, "")) == 1
    assert waits(PROGRAM) == 2  # a branch, and a loop of unknown length
    assert waits(PROGRAM.replace("conditional", "add")) == 1


def test_the_command_prints_a_table_or_json(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    arguments = ["plan", "--model", str(tmp_path), "--topology", "v5e:2x4", "--no-compile", "--budget", "64"]
    assert main(arguments) == 0
    assert "concurrent sequences of 8192 tokens" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] is True
    assert printed["steps"][0]["bound"] == "memory"
    assert main(["plan", "--model", str(tmp_path / "no"), "--topology", "v5e:2x4"]) == 2
    assert "neither an existing directory or .gguf file" in capsys.readouterr().err


def test_weights_are_divided_except_those_that_every_device_needs() -> None:
    model_bytes = plan(LLAMA_3_8B, "v5e:1x1").memory.weights
    from fastgen_jax.models.families import family_of

    model = family_of("LlamaForCausalLM").config_from_hf(LLAMA_3_8B)
    norms = 2 * 65 * 4096
    padding = 2 * 2 * (VOCAB_OF_EIGHT - 128_256 // 8) * 4096  # of embedding and head
    assert weight_bytes(model, 8, 2) == (model_bytes - norms) // 8 + norms + padding


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    from fastgen_jax.models.families import family_of

    model = family_of("MixtralForCausalLM").config_from_hf(MIXTRAL_8X7B)
    whole, expert = weight_bytes(model, 8, 2), 3 * 4096 * 14336 * 2 // 8
    assert read_weight_bytes(model, 8, 2, tokens=1) == whole - 32 * 6 * expert
    assert whole - read_weight_bytes(model, 8, 2, tokens=64) < 32 * expert / 1e6
    dense = family_of("LlamaForCausalLM").config_from_hf(LLAMA_3_8B)
    assert read_weight_bytes(dense, 1, 2, tokens=1) == weight_bytes(dense, 1, 2)


def test_without_a_cuda_compiler_gpus_are_planned_by_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen_jax.devices import NoCompiler
    from fastgen_jax.plan import program

    def missing(*arguments: object, **options: object) -> None:
        raise NoCompiler("no CUDA compiler here (topology not implemented for cuda); pip install 'fastgen_jax[cuda]'")

    monkeypatch.setattr(program, "deviceless_mesh", missing)
    made = make_plan(
        LLAMA_3_8B,
        topology="a100",
        context=4096,
        budgets=[512],
        max_num_seqs=64,
        block_size=32,
        dtype="bfloat16",
        compile=True,
    )
    assert made.fits
    assert made.checks == ()
    assert "not compiled: no CUDA compiler here" in table(made)
    assert made.steps[0].compute > 2 * 7e9 * 512 / 312e12
    h100 = plan(LLAMA_3_8B, "h100", context=4096, budgets=[512])
    assert h100.not_compiled == ""  # not requested
    assert h100.steps[0].seconds < made.steps[0].seconds


@pytest.mark.parametrize("kind", [device.kind for device in DEVICES.values() if device.platform == "cuda"])
def test_every_gpu_has_a_target_description_for_the_compiler(kind: str) -> None:
    from fastgen_jax.plan import program

    text = (Path(program.__file__).parent / "targets" / f"{kind}.txtpb").read_text()
    assert all(part in text for part in kind.upper().split("-"))  # its name and, if there are two versions, its memory
    memory = int(re.findall(r"device_memory_size: (\d+)", text)[0])
    assert 0.95 * DEVICES[kind].memory_bytes < memory <= DEVICES[kind].memory_bytes
    assert int(re.findall(r"memory_bandwidth: (\d+)", text)[0]) == pytest.approx(DEVICES[kind].memory_bytes_per_s, rel=0.01)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
        ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("llama", {"quant_method": "awq", "bits": 4, "version": "gemm"}),
        ("llama", {"quant_method": "gptq", "bits": 4}),
    ],
)
def test_quantized_weights_are_planned_as_they_are_loaded(family: str, settings: dict) -> None:
    tiny = {"gpt_oss": "families/gpt_oss/mxfp4", "deepseek_v3": "families/deepseek_v3/fp8", "llama": "tiny/default"}
    # Other vocabularies are filled up, and on a TPU these tiny experts.
    config = json.loads((REFERENCE / tiny[family] / "config.json").read_text()) | {"vocab_size": 128}
    quantized = plan(config | {"quantization_config": settings}, "h100:1", context=64)
    plain = plan({name: value for name, value in config.items() if name != "quantization_config"}, "h100:1", context=64)
    assert quantized.memory == plain.memory
    assert plain.memory.weights == 2 * plain.num_params  # experts in some layers, an MLP in others
    assert f"bfloat16; on disk {settings['quant_method']}, dequantized while loading" in table(quantized)


def test_numbers_of_4_bits_are_planned_as_such_by_the_settings_alone(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("fastgen_jax.plan.kernels.int4_needs", lambda kernel: None)  # as with the jax that has the kernels
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_3_8B | {"quantization_config": settings}))
    flags = ("plan", "--model", str(file), "--topology", "v5e:1x1", "--no-compile")
    assert main(list(flags)) == 0
    shown = capsys.readouterr().out
    # 6.98e9 numbers of 4.5 bits, and embedding and head in bfloat16
    assert "weights            5.61 GiB   bfloat16; on disk awq, partly kept" in shown
    assert "6.98B of 6.98B quantized weights stay in the 4 bits of the checkpoint" in shown
    assert "it fits" in shown
    assert main([*flags, "--quantize", "none"]) == 1
    assert "weights           14.96 GiB   bfloat16; on disk awq, dequantized while loading" in capsys.readouterr().out
    settings["modules_to_not_convert"] = ["down_proj"]
    file.write_text(json.dumps(LLAMA_3_8B | {"quantization_config": settings}))
    main(list(flags))
    assert "5.1B of 5.1B quantized weights stay" in capsys.readouterr().out


def test_a_quantization_that_cannot_be_loaded_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"quant_method is 'hqq'; supported: mxfp4, fp8, "):
        plan(LLAMA_3_8B | {"quantization_config": {"quant_method": "hqq"}}, "v5e:2x4")


def test_int8_weights_take_a_byte_each_and_a_scale_per_column() -> None:
    wide, narrow = plan(LLAMA_3_8B, "v5e:2x4"), plan(LLAMA_3_8B, "v5e:2x4", quantize="int8")
    vocab = 8 * VOCAB_OF_EIGHT
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 2 * 14336 + 14336 * 4096) + 4096 * vocab
    divided = 4 * (32 * (6144 + 2 * 14336) + vocab) // 8  # each device has its own columns of qkv, gate_up and lm_head
    whole = 4 * 32 * (4096 + 4096)  # it has its own rows of o and down, with the scales of all columns
    assert wide.memory.weights - narrow.memory.weights == matrices // 8 - divided - whole
    assert narrow.steps[0].memory < wide.steps[0].memory
    assert narrow.sequences > wide.sequences
    assert "int8 matrices, the rest bfloat16" in table(narrow)
    assert any("--quantize int8" in line for line in plan(LLAMA_3_8B, "l4", dtype="float32").advice)


def test_w8a8_has_the_weights_of_int8() -> None:
    for kind in ("v5e:2x4", "v6e:2x4"):
        int8, both = (plan(LLAMA_3_8B, kind, quantize=quantize).memory.weights for quantize in ("int8", "w8a8"))
        assert int8 == both
    with pytest.raises(
        ValueError, match="quantize is 'w8a8', but h100 does not multiply int8 by int8; choose 'int8', or one"
    ):
        plan(LLAMA_3_8B, "h100:8", quantize="w8a8")


def test_int8_experts_are_read_as_bytes() -> None:
    from fastgen_jax.models.families import family_of

    model = family_of("MixtralForCausalLM").config_from_hf(MIXTRAL_8X7B)
    whole, one = (read_weight_bytes(model, 8, 2, tokens=n, quantize="int8") for n in (10_000, 1))
    assert whole == weight_bytes(model, 8, 2, quantize="int8")
    assert whole - one == 32 * 6 * 3 * 4096 * 14336 // 8


KEPT_EXPERTS = (("layers.expert_gate_up", 4.25), ("layers.expert_down", 4.25))


@pytest.mark.parametrize(("options", "bits"), [({"kept": KEPT_EXPERTS}, 4.25), ({"quantize": "int4"}, 4.5)])
def test_experts_of_4_bits_are_read_as_such(options: dict, bits: float) -> None:
    from fastgen_jax.models.families import family_of

    model = family_of("MixtralForCausalLM").config_from_hf(MIXTRAL_8X7B)
    whole, one = (read_weight_bytes(model, 1, 4, tokens=n, **options) for n in (10_000, 1))
    assert whole - one == 32 * 6 * 3 * 4096 * 14336 * bits / 8


def test_a_tied_int8_head_is_stored_in_addition_to_the_embedding_on_a_single_device() -> None:
    config = json.loads((REFERENCE / "tiny" / "default" / "config.json").read_text()) | {"tie_word_embeddings": True}
    apart, tied = (
        plan(config | {"tie_word_embeddings": tie}, "l4", context=64, quantize="int8").memory.weights
        for tie in (False, True)
    )
    assert apart == tied


def test_a_context_beyond_the_models_limit_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"context is 100000 but the model's limit is 8192 tokens; choose at most that"):
        plan(LLAMA_3_8B, "v5e:2x4", context=100_000)
    with pytest.raises(ValueError, match="must be at least 1"):
        plan(LLAMA_3_8B, "v5e:2x4", context=0)
    assert plan(LLAMA_3_8B, "v5e:2x4", context=None).context == 8192


def run_plan(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert main(["plan", *map(str, flags), "--topology", "h100", "--no-compile"]) == 0
    return capsys.readouterr().out


def test_a_model_can_be_planned_by_every_name_that_loads_it(tmp_path, capsys) -> None:
    write_gguf(tmp_path / "a.gguf", kind="Q8_0", vocab_size=512)
    assert "bfloat16; on disk Q8_0, dequantized while loading" in run_plan(capsys, "--model", tmp_path / "a.gguf")
    tiny = REFERENCE / "tiny" / "default"
    directory, alone = (run_plan(capsys, "--model", path) for path in (tiny, tiny / "config.json"))
    assert directory == alone
    assert "contexts of 512 tokens" in run_plan(capsys, "--model", "sotu-1m")  # a snapshot with a name


def test_an_int8_snapshot_is_planned_as_int8(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    assert "weights           14.96 GiB   bfloat16" in run_plan(capsys, "--model", tmp_path)
    (tmp_path / "fastgen.json").write_text(json.dumps({"format": 1, "dtype": "bfloat16", "quantize": "int8"}))
    snapshot = run_plan(capsys, "--model", tmp_path)
    (tmp_path / "fastgen.json").unlink()
    assert snapshot == run_plan(capsys, "--model", tmp_path, "--quantize", "int8")


def test_only_the_config_of_a_repository_is_downloaded(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    requested = []

    def download(repo: str, *, allow_patterns: list[str], **_: object) -> str:
        requested.append((repo, allow_patterns))
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "8,030,261,248 parameters" in run_plan(capsys, "--model", "meta-llama/Meta-Llama-3-8B")
    assert requested == [("meta-llama/Meta-Llama-3-8B", ["config.json"])]


def test_an_unusable_config_is_reported(tmp_path, capsys) -> None:
    config = tmp_path / "config.json"
    for text, words in (("{", "is not JSON"), ("[1]", "has no architectures")):
        config.write_text(text)
        assert main(["plan", "--model", str(tmp_path), "--topology", "h100"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "memory"), [("h200:8", 141), ("h100", 80), ("a100-80gb:2", 80), ("A100-40GB", 40), ("l4", 22.5), ("t4:4", 15)]
)
def test_gpus_have_the_memory_that_ecc_leaves(name: str, memory: float) -> None:
    assert parse_topology(name).device.memory_bytes == memory * GIB


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e", "no TPU compiler here (JAX TPU support not installed"),
        ("h100", "no CUDA compiler here (topology not implemented"),
    ],
)
def test_a_missing_compiler_can_be_skipped(topology: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def missing(*_: object, **options: object) -> None:
        if options["platform"] == "tpu":
            raise RuntimeError(
                "JAX TPU support not installed; cannot generate TPU topology. See https://github.com/jax-ml/jax"
            )
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("fastgen_jax.plan.program.too_old", lambda version: None)  # as with the jax that compiles
    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    made = make_plan(
        LLAMA_3_8B,
        topology=topology,
        context=512,
        budgets=[64],
        max_num_seqs=4,
        block_size=32,
        dtype="bfloat16",
        quantize="int8",
        compile=True,
    )
    assert words in made.not_compiled
    assert made.not_compiled.endswith("or skip it with --no-compile")


def test_a_step_with_int8_weights_is_compiled_for_the_local_device() -> None:
    import jax

    from fastgen_jax.models.families import family_of
    from fastgen_jax.models.sharding import tensor_mesh
    from fastgen_jax.plan.program import compile_step

    config = json.loads((REFERENCE / "tiny" / "default" / "config.json").read_text())
    model = family_of("LlamaForCausalLM").config_from_hf(config)
    program = compile_step(
        model,
        tensor_mesh(jax.devices()[:1]),
        token_budget=1,
        max_num_seqs=1,
        max_context_len=16,
        block_size=4,
        num_blocks=4,
        dtype="float32",
        quantize="int8",
    )
    assert program.arguments - program.cache < 0.7 * weight_bytes(model, 1, 4)


def test_an_old_jax_does_not_compile_for_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen_jax.devices import NoCompiler
    from fastgen_jax.plan.program import deviceless_mesh

    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    with pytest.raises(NoCompiler, match=r"needs jax 0\.10\.2 or newer .* skip it with --no-compile"):
        deviceless_mesh(parse_topology("v5e:1x1"))
