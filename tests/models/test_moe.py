"""Routing and experts compared with NumPy, token by token, and independence of padding and other tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.models.division import divided_array
from fastgen_jax.models.moe import moe, route
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.params import expert_specs
from pallas_kernels import native
from pallas_kernels.grouped_matmul import prepare as prepare_groups
from pallas_kernels.matmul import prepare
from tests.models.test_sharding import TINY

_E, _T = 12, 21
_PLAIN = MoEConfig(num_experts=8, experts_per_token=3, expert_dim=10, layers=(0,))
_CONFIGS = {
    "plain": _PLAIN,
    "normalized": replace(_PLAIN, normalize=True, scale=2.5),
    "softmax_of_chosen": replace(_PLAIN, scores="softmax_of_chosen", router_bias=True),
    "best_of_group": replace(_PLAIN, num_groups=4, groups_per_token=2),
    "two_best_of_group": replace(
        _PLAIN, scores="sigmoid", choice_bias=True, normalize=True, num_groups=4, groups_per_token=2, group_score="two_best"
    ),
    "clamped": replace(_PLAIN, swiglu_limit=0.5, expert_bias=True),
    "shared": replace(_PLAIN, shared_dim=6),
    "gated_shared": replace(_PLAIN, shared_dim=6, shared_gate=True),
    "latent": replace(_PLAIN, gated=False, activation="relu2", latent_dim=7, shared_dim=6),
}


def _weights(config: MoEConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, f, s, width = config.num_experts, config.expert_dim, config.shared_dim, config.latent_dim or _E
    shapes: dict[str, tuple[int, ...]] = {
        "router": (_E, x),
        "router_bias": (x,),
        "choice_bias": (x,),
        "expert_gate_up": (x, _E, 2 * f),
        "expert_gate_up_bias": (x, 2 * f),
        "expert_down": (x, f, width),
        "expert_down_bias": (x, _E),
        "shared_gate_up": (_E, 2 * s),
        "shared_down": (s, _E),
    }
    if not config.gated:
        shapes |= {"expert_up": (x, width, f), "shared_up": (_E, s), "latent_in": (_E, width), "latent_out": (width, _E)}
    if config.shared_gate:
        shapes["shared_gate"] = (_E, 1)
    return {name: rng.standard_normal(shape, np.float32) / 2 for name, shape in shapes.items()}


def _tokens(count: int = _T) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, _E), np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def _numpy_route(x: np.ndarray, w: dict[str, np.ndarray], c: MoEConfig) -> dict[int, float]:
    """Expert -> weight, of one token."""
    logits = x.astype(np.float64) @ w["router"] + (w["router_bias"] if c.router_bias else 0)
    scores = _sigmoid(logits) if c.scores == "sigmoid" else _softmax(logits)
    merits = scores + (w["choice_bias"] if c.choice_bias else 0)
    groups = np.split(np.arange(c.num_experts), c.num_groups)
    best = 1 if c.group_score == "max" else 2
    groups.sort(key=lambda group: -np.sort(merits[group])[-best:].sum())
    allowed = np.concatenate(groups[: c.groups_per_token])
    chosen = sorted(allowed, key=lambda expert: -merits[expert])[: c.experts_per_token]
    weights = _softmax(logits[chosen]) if c.scores == "softmax_of_chosen" else scores[chosen]
    return dict(zip(chosen, c.scale * weights / (weights.sum() if c.normalize else 1), strict=True))


def _numpy_moe(x: np.ndarray, w: dict[str, np.ndarray], c: MoEConfig) -> np.ndarray:
    y = np.zeros(x.shape)
    for t, token in enumerate(x.astype(np.float64)):
        if not c.gated:
            mixed = sum(
                weight * np.square(np.maximum(token @ w["latent_in"] @ w["expert_up"][expert], 0)) @ w["expert_down"][expert]
                for expert, weight in _numpy_route(token, w, c).items()
            )
            y[t] = mixed @ w["latent_out"] + np.square(np.maximum(token @ w["shared_up"], 0)) @ w["shared_down"]
            continue
        for expert, weight in _numpy_route(token, w, c).items():
            hidden = token @ w["expert_gate_up"][expert]
            if c.swiglu_limit is None:
                gate, up = np.split(hidden, 2)
                y[t] += weight * (gate * _sigmoid(gate) * up) @ w["expert_down"][expert]
            else:
                gate, up = np.split(hidden + w["expert_gate_up_bias"][expert], 2)
                gate, up = np.minimum(gate, c.swiglu_limit), np.clip(up, -c.swiglu_limit, c.swiglu_limit)
                hidden = gate * _sigmoid(1.702 * gate) * (up + 1)
                y[t] += weight * (hidden @ w["expert_down"][expert] + w["expert_down_bias"][expert])
        if c.shared_dim:
            gate, up = np.split(token @ w["shared_gate_up"], 2)
            shared = (gate * _sigmoid(gate) * up) @ w["shared_down"]
            y[t] += shared * (_sigmoid(token @ w["shared_gate"]) if c.shared_gate else 1)
    return y


def _prepared(w: dict[str, np.ndarray], c: MoEConfig) -> dict[str, Any]:
    """As the engine prepares them for this platform."""
    gated = {"shared_gate_up": True, "expert_gate_up": c.swiglu_limit is None}
    made = {}
    for name, array in w.items():
        make = prepare if array.ndim == 2 else prepare_groups
        is_matrix = array.ndim >= 2 and not name.endswith("_bias") and array.size
        made[name] = make(array, platform="cpu", gated=gated.get(name, False)) if is_matrix else jnp.asarray(array)
    return made


@pytest.mark.parametrize("name", _CONFIGS)
def test_tokens_are_sent_to_the_experts_that_numpy_chooses(name: str):
    config, x = _CONFIGS[name], _tokens()
    w = _weights(config)
    weights, chosen = route(jnp.asarray(x), {key: jnp.asarray(value) for key, value in w.items()}, config=config)
    for t, token in enumerate(x):
        expected = _numpy_route(token, w, config)
        got = dict(zip(np.asarray(chosen)[t].tolist(), np.asarray(weights)[t].tolist(), strict=True))
        assert got.keys() == expected.keys()
        for expert, weight in expected.items():
            assert got[expert] == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("name", _CONFIGS)
def test_experts_compute_what_numpy_computes_token_by_token(name: str):
    config, x = _CONFIGS[name], _tokens()
    w = _weights(config)
    residual = np.random.default_rng(2).standard_normal(x.shape, np.float32)
    got = moe(jnp.asarray(x), _prepared(w, config), config=config, num_tokens=jnp.int32(_T), residual=jnp.asarray(residual))
    np.testing.assert_allclose(got, _numpy_moe(x, w, config) + residual, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "clamped"])
def test_experts_that_are_filled_up_for_a_tpu_compute_the_same(name: str):
    config, x = _CONFIGS[name], _tokens()
    w = _weights(config)
    filled, model = dict(w), replace(TINY, moe=config)
    for spec in expert_specs(_E, config).values():
        axes = range(-len(spec.shape), 0)
        filled[spec.name] = divided_array(spec, w[spec.name], model, 1, axes=axes, fill=0, platform="tpu")
    assert filled["expert_gate_up"].shape == (8, _E, 128)
    assert filled["expert_down"].shape == (8, 64, 128)
    got = moe(jnp.asarray(x), jax.tree.map(jnp.asarray, filled), config=config, num_tokens=jnp.int32(_T), residual=None)
    np.testing.assert_allclose(got, _numpy_moe(x, w, config), atol=2e-5)


@pytest.mark.parametrize("name", ["clamped", "gated_shared"])
def test_experts_in_bfloat16_stay_near_those_of_numpy(name: str):
    config, x = _CONFIGS[name], np.asarray(jnp.asarray(_tokens(), jnp.bfloat16))
    w = {key: np.asarray(jnp.asarray(value, jnp.bfloat16)) for key, value in _weights(config).items()}
    got = moe(jnp.asarray(x), jax.tree.map(jnp.asarray, w), config=config, num_tokens=jnp.int32(_T), residual=None)
    assert got.dtype == jnp.bfloat16
    exact = {key: value.astype(np.float32) for key, value in w.items()}
    want = _numpy_moe(x.astype(np.float32), exact, config)
    assert np.abs(got.astype(jnp.float32) - want).mean() < 0.01 * np.abs(want).max()


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["shared", "clamped"])
def test_the_result_of_a_token_does_not_depend_on_other_tokens_or_padding(name: str):
    config, x = _CONFIGS[name], _tokens(40)
    w = _prepared(_weights(config), config)
    run = jax.jit(lambda x, num_tokens: moe(x, w, config=config, num_tokens=num_tokens, residual=x))
    together = np.asarray(run(jnp.asarray(x), jnp.int32(40)))
    for mine in ([3], [5, 17, 30], list(range(25))):
        batch = np.full_like(x, 1e30)  # padding that would overflow if an expert computed it
        batch[: len(mine)] = x[mine]
        got = np.asarray(run(jnp.asarray(batch), jnp.int32(len(mine))))
        np.testing.assert_array_equal(got[: len(mine)], together[mine])


def test_padding_is_in_no_group(monkeypatch: pytest.MonkeyPatch):
    from fastgen_jax.models import moe as module

    sizes: list[np.ndarray] = []
    original = module.grouped_matmul

    def spy(rows: jax.Array, w: Any, group_sizes: jax.Array, **options: Any) -> jax.Array:
        sizes.append(np.asarray(group_sizes))
        return original(rows, w, group_sizes, **options)

    monkeypatch.setattr(module, "grouped_matmul", spy)
    moe(
        jnp.asarray(_tokens()),
        {key: jnp.asarray(value) for key, value in _weights(_PLAIN).items()},
        config=_PLAIN,
        num_tokens=jnp.int32(5),
        residual=None,
    )
    assert [int(size.sum()) for size in sizes] == [5 * _PLAIN.experts_per_token]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 9}, r"experts_per_token is 9; with num_experts=8 it must be in \[1, 8\]"),
        ({"num_groups": 3}, "num_groups is 3 and groups_per_token is 1; num_groups must divide num_experts=8"),
        ({"num_groups": 4}, "experts_per_token is 3, but the chosen groups hold only 2 experts"),
        ({"shared_gate": True}, "no shared expert to scale"),
    ],
)
def test_impossible_experts_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(_PLAIN, **changes)
