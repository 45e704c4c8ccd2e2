"""A step divided over several devices computes the same logits as on one device."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from fastgen_jax.models.config import ModelConfig, QueryGrowth, RopeConfig
from fastgen_jax.models.division import (
    Heads,
    check_num_devices,
    divided,
    divided_array,
    divided_heads,
    divided_parts,
    divided_shape,
)
from fastgen_jax.models.families.common import alibi_slopes
from fastgen_jax.models.moe_config import IndexerConfig, MLAConfig, MoEConfig
from fastgen_jax.models.params import all_specs, layer_specs
from fastgen_jax.models.state_config import DeltaNet, Mamba2, ShortConv
from fastgen_jax.models.stream_config import AltUp, LayerInputs
from fastgen_jax.models.weight_spec import Kind

TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_context_len=64,
)
MOE = MoEConfig(
    num_experts=4,
    experts_per_token=2,
    expert_dim=24,
    layers=(0, 1),
    shared_dim=16,
    shared_gate=True,
    expert_bias=True,
    swiglu_limit=3.0,
)
EXPERTS = dataclasses.replace(TINY, moe=MOE)


# Nothing divides evenly: 6 query heads and 3 KV heads, an MLP of 47, 61 tokens.
UNEVEN = dataclasses.replace(
    TINY, vocab_size=61, num_heads=6, num_kv_heads=3, mlp_dim=47, qkv_bias=True, o_bias=True, mlp_bias=True
)
NORMS = dataclasses.replace(TINY, num_heads=6, num_kv_heads=3, clip_qkv=2.0)
# Models, the numbers of devices that divide them, and the implementation of attention.
MODELS: dict[str, tuple[ModelConfig, int, str | None]] = {
    "dense": (TINY, 2, "xla"),
    "experts": (EXPERTS, 2, None),
    "one KV head": (dataclasses.replace(TINY, num_heads=7, num_kv_heads=1, attention_sinks=True), 4, None),
    "uneven": (UNEVEN, 4, None),
    "uneven experts": (
        dataclasses.replace(
            EXPERTS,
            vocab_size=63,
            moe=dataclasses.replace(MOE, expert_dim=23, shared_dim=15, activation="gelu", swiglu_limit=None),
        ),
        4,
        None,
    ),
    "experts in a latent": (
        dataclasses.replace(
            EXPERTS,
            moe=dataclasses.replace(
                MOE,
                gated=False,
                activation="relu2",
                latent_dim=12,
                swiglu_limit=None,
                expert_bias=False,
                shared_gate=False,
            ),
        ),
        4,
        None,
    ),
    "several streams": (
        dataclasses.replace(
            TINY,
            num_layers=3,
            vocab_size=63,
            norm_placement="both",
            activation="gelu_tanh",
            qk_norm="head",
            v_norm=True,
            kv_sources=(0, 1, 1),
            gate_cutoffs=(0.5, None, None),
            laurel_rank=4,
            altup=AltUp(num_streams=3),
            layer_inputs=LayerInputs(dim=6, vocab_size=61, num_rows=61),
        ),
        2,
        None,
    ),
    "latent attention": (
        dataclasses.replace(
            TINY,
            num_heads=5,
            num_kv_heads=1,
            head_dim=14,
            rope=RopeConfig(dim=4),
            mla=MLAConfig(kv_rank=10, rope_dim=4, nope_dim=6, v_dim=9, q_rank=11),
        ),
        4,
        None,
    ),
    "chosen tokens": (
        dataclasses.replace(
            TINY,
            num_heads=5,
            num_kv_heads=1,
            head_dim=18,
            rope=RopeConfig(dim=4),
            mla=MLAConfig(
                kv_rank=10,
                rope_dim=4,
                nope_dim=6,
                v_dim=9,
                q_rank=11,
                indexer=IndexerConfig(num_heads=16, head_dim=8, num_chosen=2, layers=(0, 1)),
            ),
        ),
        4,
        None,
    ),
    "norm over all heads": (dataclasses.replace(NORMS, qk_norm="row"), 4, None),
    "norms per head": (
        dataclasses.replace(NORMS, qk_norm="per_head", norm="layer", alibi_slopes=alibi_slopes(6), rope=None),
        4,
        None,
    ),
    "chunks": (
        dataclasses.replace(
            EXPERTS,
            num_heads=6,
            num_kv_heads=3,
            qk_norm="unit",
            layer_ropes=(RopeConfig(), None),
            layer_windows=(4, None),
            window_chunks=True,
            query_growth=QueryGrowth(weight=0.5, length=4, first=1, unrotated_only=True),
            moe=dataclasses.replace(
                MOE, scores="sigmoid_of_chosen", weigh_inputs=True, expert_bias=False, swiglu_limit=None, shared_gate=False
            ),
        ),
        4,
        None,
    ),
    "norms after the rotation": (
        dataclasses.replace(
            UNEVEN,
            qk_norm="head",
            qk_norm_rotated=True,
            query_growth=QueryGrowth(weight=0.5, length=8),
            norm="layer",
            norm_bias=True,
            norm_offset=1.0,
            activation="xielu",
            mlp_gated=False,
        ),
        4,
        None,
    ),
    "Mamba 2": (
        dataclasses.replace(
            TINY,
            attention_layers=(1,),
            state=Mamba2(layers=(0, 1), num_heads=4, head_dim=6, num_groups=1, state_dim=5, width=4, bias=True),
        ),
        4,
        None,
    ),
    "Mamba 2 in groups": (
        dataclasses.replace(
            TINY,
            attention_layers=(1,),
            state=Mamba2(
                layers=(0,),
                num_heads=4,
                head_dim=6,
                num_groups=2,
                state_dim=5,
                width=3,
                norm_groups=2,
                norm_first=True,
                in_multipliers=(0.5, 1.5, 2.0, 0.7, 1.1),
            ),
        ),
        2,
        None,
    ),
    "delta nets": (
        dataclasses.replace(
            TINY,
            attention_gate=True,
            qk_norm="head",
            attention_layers=(1,),
            moe=dataclasses.replace(MOE, expert_bias=False, swiglu_limit=None),
            state=DeltaNet(layers=(0,), num_heads=4, num_key_heads=2, key_dim=6, value_dim=5, width=4),
        ),
        4,
        None,
    ),
    "short convolutions": (
        dataclasses.replace(TINY, attention_layers=(1,), state=ShortConv(layers=(0,), width=3, bias=True)),
        4,
        None,
    ),
}
QUICK = ["uneven experts"]


@pytest.mark.parametrize(
    "models", [QUICK, pytest.param([name for name in MODELS if name not in QUICK], marks=pytest.mark.slow)]
)
def test_a_step_divided_over_devices_gives_the_same_logits(models: list[str]) -> None:
    # In another process: the number of devices is fixed when JAX starts.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.models.programs.divided_step", *models]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize(
    ("heads", "devices", "query", "kv"),
    [
        ((4, 2), 2, (0, 1, 2, 3), (0, 1)),  # as it is
        ((6, 3), 2, (0, 1, 2, 3, 4, 5, None, None), (0, 1, 2, None)),
        ((6, 1), 4, (0, 1, 2, 3, 4, 5, None, None), (0, 0, 0, 0)),
        ((6, 2), 4, (0, 1, 2, None, 3, 4, 5, None), (0, 0, 1, 1)),
        ((5, 1), 4, (0, 1, 2, 3, 4, None, None, None), (0, 0, 0, 0)),
    ],
)
def test_heads_are_repeated_and_filled_up(heads, devices, query, kv) -> None:
    assert divided_heads(*heads, devices) == Heads(query=query, kv=kv)


@pytest.mark.parametrize("num_devices", range(1, 13))
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 6, 12])
def test_every_query_head_is_on_the_device_of_its_kv_head(num_kv_heads: int, num_devices: int) -> None:
    heads = divided_heads(12, num_kv_heads, num_devices)
    assert len(heads.kv) % num_devices == len(heads.query) % len(heads.kv) == 0
    share, group = len(heads.query) // len(heads.kv), 12 // num_kv_heads
    assert sorted(head for head in heads.query if head is not None) == list(range(12))
    for place, head in enumerate(heads.query):
        assert head is None or heads.kv[place // share] == head // group


WIDE_EXPERTS = dataclasses.replace(EXPERTS, moe=dataclasses.replace(MOE, expert_dim=130))


@pytest.mark.parametrize("name", [*MODELS, "wide experts"])
def test_divided_weights_have_the_shapes_of_the_divided_model(name: str) -> None:
    config, num_devices, _ = MODELS.get(name, (WIDE_EXPERTS, 2, None))
    wide = all_specs(divided(config, num_devices))
    for path, spec in all_specs(config).items():
        assert divided_shape(spec, config, num_devices) == wide[path].shape
        parts = divided_parts(spec, config, num_devices)
        assert parts == divided_parts(wide[path], divided(config, num_devices), 1)
        assert sum(parts) in (0, wide[path].shape[-1])
        array = divided_array(spec, np.ones(spec.shape), config, num_devices, axes=range(-len(spec.shape), 0), fill=0)
        assert array.shape == wide[path].shape
        assert array.sum() >= np.prod(spec.shape)


def test_a_model_that_devices_divide_as_it_is_stays_the_same() -> None:
    assert divided(EXPERTS, 2) == EXPERTS
    array = np.arange(32 * 64.0).reshape(32, 64)
    assert divided_array(layer_specs(TINY, 0)["qkv"], array, TINY, 2, axes=(-2, -1), fill=0) is array


def test_shares_of_wide_experts_are_filled_up_to_whole_tiles() -> None:
    widths = {}
    for num_devices in (1, 2, 4):
        moe = divided(WIDE_EXPERTS, num_devices).moe
        assert moe is not None
        widths[num_devices] = moe.expert_dim
    assert widths == {1: 130, 2: 2 * 128, 4: 4 * 33}


@pytest.mark.parametrize("num_devices", [1, 4])
def test_experts_on_a_tpu_are_filled_up_to_whole_tiles(num_devices: int) -> None:
    wide = divided(EXPERTS, num_devices, "tpu")
    assert wide.moe is not None
    assert (wide.moe.expert_dim, wide.moe.down_dim) == (64 * num_devices, 128)
    without_gate = divided(dataclasses.replace(EXPERTS, moe=dataclasses.replace(MOE, gated=False)), num_devices, "tpu").moe
    assert without_gate is not None
    assert without_gate.expert_dim == 128 * num_devices  # gate and up fill the lanes together, up alone does not
    shapes = {spec.name: spec.shape for spec in layer_specs(wide, 0).values()}
    for name, spec in layer_specs(EXPERTS, 0).items():
        array = np.ones(spec.shape)
        axes = range(-len(spec.shape), 0)
        filled = divided_array(spec, array, EXPERTS, num_devices, axes=axes, fill=0, platform="tpu")
        assert filled.shape == divided_shape(spec, EXPERTS, num_devices, "tpu") == shapes[name]
        assert spec.kind is not Kind.EXPERTS or filled.sum() == array.sum()


def test_scales_of_8_bit_weights_are_filled_up_with_ones() -> None:
    spec = layer_specs(UNEVEN, 0)["gate_up"]
    scales = divided_array(spec, np.full((2, 94), 3.0), UNEVEN, 4, axes=(-1,), fill=1)
    assert scales.shape == (2, 96)
    assert (scales[:, [47, 95]] == 1).all()
    assert (scales == 3).sum() == 2 * 94


@pytest.mark.parametrize(
    ("name", "num_devices", "words"),
    [
        ("Mamba 2", 3, "4 heads of its states cannot be divided over 3 devices.*a divisor of 4, for example 2"),
        ("Mamba 2 in groups", 4, "2 parts of its states that are normalized"),
        ("short convolutions", 3, "32 channels"),
    ],
)
def test_states_whose_heads_do_not_divide_are_refused(name: str, num_devices: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_num_devices(MODELS[name][0], num_devices)


def test_more_devices_than_heads_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"4 attention heads cannot be divided over 5 devices.*choose at most 4 devices"):
        check_num_devices(TINY, 5)
