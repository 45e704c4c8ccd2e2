"""tunix over this engine: the same weights, the same tokens, and its own GRPO learner. `make tunix-check` runs them."""

from __future__ import annotations

import asyncio
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
    "tunix", reason="google-tunix is not installed; make tunix-check runs these tests in an environment with it"
)

import optax
from flax import nnx
from tunix.generate import sampler as tunix_sampler
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3
from tunix.rl import common
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.training import Options
from fastgen_jax.training.tunix import Model, Rollout, Sampler, params_from_state
from fastgen_jax.training.tunix.rollout import generate
from tests.tiny import greedy as greedy_params
from tests.tiny import random_params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of tunix and its libraries
]

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 32, 48, 4, 2, 8, 2
SIZES = {
    "vocab_size": VOCAB,
    "num_layers": LAYERS,
    "embed_dim": WIDTH,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "mlp_dim": HIDDEN,
    "max_context_len": 256,
}
ENGINE = {
    "dtype": "float32",
    "token_budget": 32,
    "budget_ladder": (8,),
    "max_num_seqs": 8,
    "block_size": 4,
    "num_blocks": 128,
}
THETA = 1_000_000  # tunix 0.1.7 rotates Llama 3 and Qwen 3 with this one, whatever their config says
PAD, BOS, EOS = 0, 1, 2


class Letters:
    """A tokenizer with one token for each of some characters."""

    ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'"

    def encode(self, text: str) -> list[int]:
        return [3 + self.ALPHABET.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.ALPHABET[i - 3] for i in ids if 3 <= i < 3 + len(self.ALPHABET))

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD


@pytest.fixture(autouse=True)
def _as_tunix_expects():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


PROMPTS = ["hello", "a longer prompt", "hello", "Why?"]


def config_of(family: str) -> ModelConfig:
    rope = RopeConfig(theta=10_000.0 if family == "gemma3" else float(THETA))
    more = {
        "llama": {},
        "qwen2": {"qkv_bias": True, "tie_embeddings": True},
        "qwen3": {"qk_norm": "head"},
        "gemma3": {
            "qk_norm": "head",
            "norm_offset": 1.0,
            "norm_placement": "both",
            "embed_multiplier": float(np.sqrt(WIDTH)),
            "tie_embeddings": True,
            "activation": "gelu_tanh",
            "norm_eps": 1e-6,
            "layer_windows": (16, 16),
            "layer_ropes": (rope, rope),
        },
    }
    return ModelConfig(family=family, rope=rope, eos_token_ids=(EOS,), **{"norm_eps": 1e-5, **SIZES, **more[family]})


def tunix_model(family: str) -> nnx.Module:
    """A model of tunix with random weights, those of norms and biases too."""
    sizes = {
        "num_layers": LAYERS,
        "embed_dim": WIDTH,
        "hidden_dim": HIDDEN,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    common_sizes = {**sizes, "vocab_size": VOCAB, "rope_theta": THETA, "norm_eps": 1e-5}
    rngs = nnx.Rngs(0)
    if family == "llama":
        model = llama3.Llama3(llama3.ModelConfig(**common_sizes), rngs=rngs)
    elif family == "qwen2":
        model = qwen2.Qwen2(qwen2.ModelConfig(**common_sizes, use_tied_embedding=True), rngs=rngs)
    elif family == "qwen3":
        model = qwen3.Qwen3(qwen3.ModelConfig(**common_sizes), rngs=rngs)
    else:
        config = gemma3.ModelConfig(
            **sizes, num_embed=VOCAB, sliding_window_size=16, global_base_frequency=THETA, param_dtype=jnp.float32
        )
        model = gemma3.Gemma3(config, rngs=rngs)
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), state))
    return model


def logprobs_of(model: nnx.Module, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    found = common.compute_per_token_logps(
        graph,
        state,
        prompt_tokens=jnp.asarray(prompts),
        completion_tokens=jnp.asarray(completions),
        pad_id=PAD,
        eos_id=EOS,
    )
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def rollout_of(model: nnx.Module, config: ModelConfig) -> Rollout:
    engine = Engine(random_params(config, seed=5), config, EngineConfig(**ENGINE))
    return Rollout(engine=engine, rollout_actor=model, tokenizer=TokenizerAdapter(Letters()))


def padded(rows: list[np.ndarray]) -> np.ndarray:
    length = max(map(len, rows))
    return np.array([[*row, *[PAD] * (length - len(row))] for row in rows], np.int32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tunix_own_sampler_and_the_engine_give_the_same_tokens_for_the_same_weights(family):
    model, config = tunix_model(family), config_of(family)
    cache = tunix_sampler.CacheConfig(cache_size=64, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    theirs = tunix_sampler.Sampler(model, Letters(), cache)(PROMPTS, max_generation_steps=12, max_prompt_length=16)
    settings = base_rollout.RolloutConfig(
        max_tokens_to_generate=12, temperature=0.0, max_prompt_length=16, return_logprobs=True
    )
    rollout = rollout_of(model, config)
    ours = rollout.generate(PROMPTS, settings)
    np.testing.assert_array_equal(ours.left_padded_prompt_tokens, theirs.padded_prompt_tokens)
    for got, want in zip(ours.tokens, theirs.tokens, strict=True):
        until = list(got).index(EOS) if EOS in got else len(got)
        np.testing.assert_array_equal(got[:until], np.asarray(want)[:until])
        assert until >= min(len(want), 12) or EOS in got
    assert ours.text == list(theirs.text)
    completions = padded(ours.tokens)
    want = logprobs_of(model, ours.left_padded_prompt_tokens, completions)
    for row, (got, tokens) in enumerate(zip(ours.logprobs, ours.tokens, strict=True)):
        np.testing.assert_allclose(got, want[row, : len(tokens)], atol=1e-4)
    scored = rollout.get_per_token_logps(ours.left_padded_prompt_tokens, completions)
    for row, tokens in enumerate(ours.tokens):
        np.testing.assert_allclose(scored[row, : len(tokens)], want[row, : len(tokens)], atol=1e-4)


def test_the_log_probabilities_of_a_rollout_are_those_of_the_trainer_at_its_temperature():
    config = config_of("qwen3")
    model = Model(random_params(config, seed=1), config)
    rollout = rollout_of(model, config)
    settings = base_rollout.RolloutConfig(
        max_tokens_to_generate=10, temperature=0.7, top_p=0.8, max_prompt_length=16, return_logprobs=True, seed=3
    )
    first, second = (rollout.generate(PROMPTS, settings) for _ in range(2))
    assert [tokens.tolist() for tokens in first.tokens] != [tokens.tolist() for tokens in second.tokens]
    assert first.tokens[0].tolist() != first.tokens[2].tolist(), "two answers to one prompt"
    graph, state = nnx.split(model)
    want = common.compute_per_token_logps(
        graph,
        state,
        prompt_tokens=jnp.asarray(first.left_padded_prompt_tokens),
        completion_tokens=jnp.asarray(padded(first.tokens)),
        pad_id=PAD,
        eos_id=EOS,
        temperature=0.7,
    )
    for row, got in enumerate(first.logprobs):
        np.testing.assert_allclose(got, np.asarray(want)[row, : len(got)], atol=1e-4)


def test_a_model_gives_the_engine_its_arrays_without_a_copy():
    config = config_of("qwen3")
    params = random_params(config, seed=1)
    found = params_from_state(nnx.state(Model(params, config), nnx.Param), config)
    same = jax.tree.map(lambda a, b: a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer(), found, params)
    assert all(jax.tree.leaves(same))


def test_a_state_of_adapters_is_refused():
    with pytest.raises(ValueError, match="no arrays for the weight embed"):
        params_from_state(nnx.State({"a": nnx.Param(jnp.zeros(3))}), config_of("llama"))


def as_many_letters_as_possible(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    return [sum(letter in "aeiou" for letter in completion) / 8 for completion in completions]


@pytest.mark.parametrize("own", [True, False], ids=["our model", "tunix' model"])
def test_tunix_grpo_learner_trains_over_our_rollouts(own, tmp_path):
    config = config_of("qwen3")
    model = Model(random_params(config, seed=1), config, Options()) if own else tunix_model("qwen3")
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    engine = Engine(random_params(config, seed=5), config, EngineConfig(**ENGINE))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = clusters.RLCluster(
        actor=model,
        reference=None,
        tokenizer=Letters(),
        cluster_config=clusters.ClusterConfig(
            role_to_mesh=dict.fromkeys((clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT), mesh),
            rollout_engine=partial(Rollout, engine=engine),
            offload_to_cpu=False,
            training_config=clusters.RLTrainingConfig(
                actor_optimizer=optax.adam(3e-3), eval_every_n_steps=100, max_steps=6, mini_batch_size=2
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=8, max_prompt_length=16, temperature=1.0, return_logprobs=True
            ),
        ),
    )
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=as_many_letters_as_possible,
        algo_config=grpo_learner.GRPOConfig(num_generations=4, num_iterations=1, beta=0.0),
    )
    assert learner.should_sync_weights
    version = engine.weight_version
    learner.train([{"prompts": np.array(["hello", "Why?"])}] * 6)
    assert engine.weight_version == version + 6
    trained = nnx.state(cluster.actor_trainer.model, nnx.Param)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, jax.tree.map(np.array, trained))
    assert max(jax.tree.leaves(moved)) > 1e-3
    # The engine generates with the trained weights.
    settings = base_rollout.RolloutConfig(
        max_tokens_to_generate=8, max_prompt_length=16, temperature=0.0, return_logprobs=True
    )
    answer = cluster.rollout.generate(["hello"], settings)
    want = logprobs_of(cluster.actor_trainer.model, answer.left_padded_prompt_tokens, padded(answer.tokens))
    np.testing.assert_allclose(answer.logprobs[0], want[0, : len(answer.tokens[0])], atol=1e-4)


def test_an_engine_is_a_sampler_of_the_newer_protocol_and_takes_new_weights_between_steps():
    protocol = pytest.importorskip("tunix.experimental.rollout.sampler", reason="this tunix has no protocol of samplers")
    config = config_of("qwen3")
    old, new = (random_params(config, seed=seed) for seed in (1, 2))
    engine = Engine(old, config, EngineConfig(**ENGINE))
    greedy = protocol.SamplingParams(max_tokens=8, temperature=0.0, return_logprobs=True)
    requests = [protocol.SamplingRequest(request_id=str(i), prompt=[BOS, 5 + i], sampling_params=greedy) for i in range(3)]

    def update(uuid: int, **extra: object) -> object:
        return protocol.WeightSyncRequest(
            policy_version=10 * uuid, extra_config={"req_id": f"r{uuid}", "uuid": uuid, **extra}
        )

    def answers_of(params) -> list[list[int]]:
        alone = Engine(params, config, EngineConfig(**ENGINE))
        found = generate(alone, [[BOS, 5 + i] for i in range(3)], [greedy_params(8)] * 3)
        return [answer.token_ids for answer in found]

    async def run() -> None:
        async with AsyncEngine(engine) as served:
            sampler = Sampler(served)
            assert isinstance(sampler, protocol.Sampler)
            first = await sampler.sample(requests, route_key="a conversation")
            assert [answer.token_ids.tolist() for answer in first] == answers_of(old)
            assert [answer.request_id for answer in first] == ["0", "1", "2"]
            assert first[0].logprobs.shape == first[0].token_ids.shape
            with pytest.raises(ValueError, match="has not begun"):
                await sampler.weight_sync(update(1, params=new))
            assert (await sampler.pre_weight_sync(update(1)))["phase"] == "prepared"
            waiting = asyncio.ensure_future(sampler.sample(requests[0]))
            await sampler.weight_sync(update(1, params=nnx.state(Model(new, config), nnx.Param)))
            assert engine.weight_version == 0
            for _ in range(2):  # a repetition changes nothing
                assert (await sampler.post_weight_sync(update(1)))["phase"] == "committed"
            assert engine.weight_version == 10
            assert (await waiting).token_ids.tolist() == answers_of(new)[0]
            await sampler.pre_weight_sync(update(2))
            await sampler.weight_sync(update(2, params=old))
            assert (await sampler.abort_weight_sync(update(2)))["phase"] == "aborted"
            with pytest.raises(ValueError, match="was aborted"):
                await sampler.post_weight_sync(update(2))
            with pytest.raises(ValueError, match="is older than"):
                await sampler.pre_weight_sync(update(1))
            assert (await sampler.sample(requests[1])).token_ids.tolist() == answers_of(new)[1]
            assert await sampler.get_weight_sync_status() == {
                "req_id": "r2",
                "uuid": 2,
                "phase": "aborted",
                "policy_version": 20,
            }
            assert (await sampler.get_load_info()).num_requests_running == 0

    asyncio.run(run())
