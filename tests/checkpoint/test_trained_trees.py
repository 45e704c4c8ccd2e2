"""Checkpoints of MaxText and of the gemma library, made from the tiny checkpoints of Hugging Face by their layouts."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import save_file

from fastgen_jax.checkpoint import gemma_library, load_params, maxtext, open_checkpoint, trained_trees
from fastgen_jax.checkpoint.trained_trees import TreeCheckpoint
from fastgen_jax.cli import main
from fastgen_jax.models.config import ModelConfig
from tests.checkpoint.test_export import assert_same_tensors, tensors_of
from tests.models.parity import folder
from tests.text.vocabularies import write_json

MAXTEXT = [
    ("llama", "default"),
    ("llama", "rope_llama3"),
    ("llama", "multi_head_tied"),
    ("mistral", "window"),
    ("mixtral", "default"),
    ("qwen2", "multi_head"),
    ("qwen2", "tied"),
    ("qwen3", "default"),
    ("qwen3_moe", "default"),
    ("gemma", "default"),
    ("gemma2", "default"),
    ("gemma3", "default"),
]
QUICK = [(("llama", "rope_llama3"), True), (("mixtral", "default"), True), (("gemma2", "default"), False)]
GEMMA = [names for names in MAXTEXT if names[0].startswith("gemma")]
SCALED_QUERIES = ("llama", "mistral", "mixtral", "gemma", "gemma2")
Tree = dict[str, Any]


class Source:
    """A tiny checkpoint, its config, and its tensors in float32, one layer at a time, matrices [in, out]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = open_checkpoint(path)
        self.config: ModelConfig = self.checkpoint.config

    def __call__(self, name: str, layer: int | None = None) -> np.ndarray:
        array = self.checkpoint.read(name if layer is None else f"model.layers.{layer}.{name}").astype(np.float32)
        return array.T if array.ndim == 2 and "embed" not in name else array

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensor_names


def put(tree: Tree, path: str, array: np.ndarray) -> None:
    """Sets `tree["a"]["b"]` for the path "a.b"."""
    *folders, leaf = path.split(".")
    for name in folders:
        tree = tree.setdefault(name, {})
    tree[leaf] = np.array(array)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def maxtext_layer(source: Source, layer: int) -> dict[str, np.ndarray]:
    """The arrays of one layer as MaxText trains them."""
    config, family = source.config, source.config.family
    e, h, k, d = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    is_gemma = family.startswith("gemma")

    def heads(name: str, count: int, *, rotated: bool) -> np.ndarray:
        array = source(f"self_attn.{name}_proj.weight", layer).reshape(e, count, d)
        if rotated and any(rope.kind == "llama3" for rope in config.ropes):  # x0 x1 ... y0 y1 ... to x0 y0 x1 y1 ...
            array = np.stack([array[..., : d // 2], array[..., d // 2 :]], axis=-1).reshape(array.shape)
        return array

    query = heads("q", h, rotated=True)
    found = {
        "self_attention.query.kernel": query / np.float32(math.sqrt(d)) if family in SCALED_QUERIES else query,
        "self_attention.key.kernel": heads("k", k, rotated=True),
        "self_attention.value.kernel": heads("v", k, rotated=False),
        "self_attention.out.kernel": source("self_attn.o_proj.weight", layer).reshape(h, d, e),
    }
    for name, count in (("query", h), ("key", k), ("value", k)):
        bias = f"self_attn.{name[0]}_proj.bias"
        if source.has(f"model.layers.{layer}.{bias}"):
            found[f"self_attention.{name}.bias"] = source(bias, layer).reshape(count, d)
        norm = f"self_attn.{name[0]}_norm.weight"
        if source.has(f"model.layers.{layer}.{norm}"):
            found[f"self_attention.{name}_norm.scale"] = source(norm, layer) + is_gemma
    norms = ("pre_self_attention_layer_norm", "post_self_attention_layer_norm")
    pairs = dict(zip(norms, ("input_layernorm", "post_attention_layernorm"), strict=True))
    if family == "gemma":
        pairs = {"pre_self_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    elif is_gemma:
        pairs = {
            "pre_self_attention_norm": "input_layernorm",
            "post_self_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    found |= {f"{ours}.scale": source(f"{theirs}.weight", layer) + is_gemma for ours, theirs in pairs.items()}
    if config.moe is None:
        names = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
        return found | {f"mlp.{ours}.kernel": source(f"mlp.{theirs}_proj.weight", layer) for ours, theirs in names.items()}
    block, module, names = "block_sparse_moe", "MoeBlock_0", {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}
    if family == "qwen3_moe":
        block, module, names = "mlp", "moe_block", {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    found[f"{module}.gate.kernel"] = source(f"{block}.gate.weight", layer)
    for ours, theirs in names.items():
        experts = [source(f"{block}.experts.{i}.{theirs}.weight", layer) for i in range(config.moe.num_experts)]
        found[f"{module}.{ours}"] = np.stack(experts)
    return found


def maxtext_tree(source: Source, *, scan: bool) -> Tree:
    """The parameters of a model as MaxText saves them, scanned along axis 1."""
    config, family = source.config, source.config.family
    embed, norm = source("model.embed_tokens.weight"), source("model.norm.weight")
    if family.startswith("gemma"):
        factor = np.float32(math.sqrt(config.embed_dim))
        embed, norm = embed * (np.float32(jax.numpy.bfloat16(factor)) if family == "gemma3" else factor), norm + 1
    padding = np.zeros((128 - len(embed) % 128, config.embed_dim), np.float32)
    tree: Tree = {}
    put(tree, "token_embedder.embedding", np.concatenate([embed, padding]))
    put(tree, "decoder.decoder_norm.scale", norm)
    if not config.tie_embeddings:
        put(tree, "decoder.logits_dense.kernel", source("lm_head.weight"))
    stacks: dict[str, list[np.ndarray]] = {}
    for layer in range(config.num_layers):
        for name, array in maxtext_layer(source, layer).items():
            first, _, rest = name.partition(".")
            place = f"layers_{layer}."
            if family == "gemma2":
                first, place = f"{first}{('_local', '_global')[layer % 2]}", f"layers_{layer // 2}."
            whole = config.num_layers // 6 * 6
            if scan and family == "gemma3" and layer >= whole:
                put(tree, f"decoder.layers_remainder.layers_{layer - whole}.{first}.{rest}", array)
            elif scan:
                inner = f"layers_{layer % 6}." if family == "gemma3" else ""
                stacks.setdefault(f"decoder.layers.{inner}{first}.{rest}", []).append(array)
            else:
                put(tree, f"decoder.{place}{first}.{rest}", array)
    for name, arrays in stacks.items():
        put(tree, name, np.stack(arrays, axis=1))
    return tree


def linen_state(tree: Tree) -> Tree:
    """A training state: parameters of Linen, and an optimizer with arrays of the same names."""
    return {"step": np.int32(7), "params": {"params": tree}, "opt_state": {"mu": {"params": tree}}}


def nnx_state(tree: Tree) -> Tree:
    """Variables of nnx, of a model within another one."""

    def variables(part: Any) -> Any:
        return {name: variables(value) for name, value in part.items()} if isinstance(part, Mapping) else {"value": part}

    return {"base": variables(tree)}


def in_memory(source: Source, tree: Mapping[str, Any], layout: Any) -> TreeCheckpoint:
    arrays = {name: tensorstore.array(np.asarray(array)) for name, array in flat(tree).items()}
    return trained_trees.from_arrays(Path("trained"), source.path, arrays, layout)


def assert_same_model(checkpoint: TreeCheckpoint, source: Source, *, rtol: float = 0.0) -> None:
    got, want = (load_params(each, dtype="float32") for each in (checkpoint, source.checkpoint))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def source_of(tmp_path):
    """Makes a `Source` of a tiny checkpoint, changed so that a trainer could have made it."""

    def make(family: str, variant: str) -> Source:
        if family == "gemma2":  # pairs of layers, and the usual scale of attention
            return Source(resized(folder(family, variant), tmp_path / "source", 4, query_pre_attn_scalar=12))
        if family == "gemma3":  # a whole block of six layers and two more
            return Source(resized(folder(family, variant), tmp_path / "source", 8))
        return Source(folder(family, variant))

    return make


def resized(path: Path, out: Path, num_layers: int, **fields: Any) -> Path:
    """A copy of a checkpoint with another number of layers, whose weights differ from one another."""
    tensors, config = tensors_of(path), json.loads((path / "config.json").read_text())
    period = config["num_hidden_layers"]
    made = {name: array for name, array in tensors.items() if ".layers." not in name}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer % period}."
        for name, array in tensors.items():
            if name.startswith(prefix):
                made[f"model.layers.{layer}.{name.removeprefix(prefix)}"] = array + np.float32(layer // period) / 8
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][layer % period] for layer in range(num_layers)]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers} | fields))
    save_file(made, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("names", "scan"),
    [
        pytest.param(
            names,
            scan,
            id=f"{'-'.join(names)}-{'scanned' if scan else 'unscanned'}",
            marks=() if (names, scan) in QUICK else pytest.mark.slow,
        )
        for names in MAXTEXT
        for scan in (True, False)
    ],
)
def test_weights_of_maxtext_are_those_of_transformers(names, scan, source_of):
    source = source_of(*names)
    wrap = linen_state if scan else nnx_state
    checkpoint = in_memory(source, wrap(maxtext_tree(source, scan=scan)), maxtext.layout)
    assert_same_model(checkpoint, source, rtol=1e-6)
    assert not checkpoint._kept, "stacks were kept although all of their layers were read"


def gemma_tree(source: Source) -> Tree:
    """The nested parameters of the gemma library."""
    config = source.config
    e, h, k, d = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    tree: Tree = {}
    put(tree, "embedder.input_embedding", source("model.embed_tokens.weight"))
    put(tree, "final_norm.scale", source("model.norm.weight"))
    names = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if config.norm_placement == "both":
        names = {
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for layer in range(config.num_layers):
        q, key, v = (source(f"self_attn.{x}_proj.weight", layer).reshape(e, -1, d).transpose(1, 0, 2) for x in "qkv")
        place = f"layer_{layer}"
        if h == k:
            put(tree, f"{place}.attn.qkv_einsum.w", np.stack([q, key, v]))
        else:
            put(tree, f"{place}.attn.q_einsum.w", q)
            put(tree, f"{place}.attn.kv_einsum.w", np.stack([key, v]))
        put(tree, f"{place}.attn.attn_vec_einsum.w", source("self_attn.o_proj.weight", layer).reshape(h, d, e))
        if config.qk_norm:
            put(tree, f"{place}.attn._query_norm.scale", source("self_attn.q_norm.weight", layer))
            put(tree, f"{place}.attn._key_norm.scale", source("self_attn.k_norm.weight", layer))
        gating = np.stack([source(f"mlp.{x}_proj.weight", layer) for x in ("gate", "up")])
        put(tree, f"{place}.mlp.gating_einsum", gating if config.family == "gemma" else gating.transpose(0, 2, 1))
        put(tree, f"{place}.mlp.linear", source("mlp.down_proj.weight", layer))
        for ours, theirs in names.items():
            put(tree, f"{place}.{ours}.scale", source(f"{theirs}.weight", layer))
    return tree


def gemma_flat(tree: Tree) -> Tree:
    """The same as the released checkpoints have it: one level of paths, then the names of arrays."""
    found: Tree = {}
    for name, array in flat(tree).items():
        name = f"{name}.w" if ".mlp." in name else name
        module, _, leaf = name.rpartition(".")
        found.setdefault("transformer/" + module.replace(".", "/"), {})[leaf] = array
    return found


def gemma_stacked(tree: Tree, pattern: int) -> Tree:
    """The same with the layers of each place in the pattern of windows stacked."""
    stacks: dict[tuple[str, str], list[np.ndarray]] = {}
    found: Tree = {}
    for module, arrays in gemma_flat(tree).items():
        for leaf, array in arrays.items():
            if match := re.fullmatch(r"transformer/layer_(\d+)/(.*)", module):
                place = f"transformer/stacked_layers/attention_type_{int(match[1]) % pattern}/{match[2]}"
                stacks.setdefault((place, leaf), []).append(array)
            else:
                found.setdefault(module, {})[leaf] = array
    for (module, leaf), rows in stacks.items():
        found.setdefault(module, {})[leaf] = np.stack(rows)
    return found


GEMMA_LAYOUTS = {
    "nested": lambda tree: tree,
    "flat": gemma_flat,
    "stacked": lambda tree: gemma_stacked(tree, 2 if "layer_6" not in tree else 6),
    "kauldron": lambda tree: {"params": tree, "opt_state": {"mu": tree}, "step": np.int32(3)},
}


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        pytest.param(
            names,
            layout,
            id=f"{'-'.join(names)}-{layout}",
            marks=() if (names[0], layout) in (("gemma", "flat"), ("gemma2", "stacked")) else pytest.mark.slow,
        )
        for names in GEMMA
        for layout in GEMMA_LAYOUTS
    ],
)
def test_weights_of_the_gemma_library_are_those_of_transformers(names, layout, source_of):
    source = source_of(*names)
    tree = GEMMA_LAYOUTS[layout](gemma_tree(source) | {"vision_encoder": {"w": np.zeros(3, np.float32)}})
    assert_same_model(in_memory(source, tree, gemma_library.layout), source)


def save(folder: Path, tree: Tree, **options: Any) -> Path:
    """Saves a tree with Orbax."""
    import orbax.checkpoint as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that host arrays have no sharding
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
    return folder


@pytest.mark.slow
def test_the_command_exports_the_last_step_of_a_run_of_maxtext(tmp_path, capsys):
    source = Source(folder("qwen3", "default"))
    shutil.copytree(source.path, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()  # config and tokenizer are enough
    write_json(tmp_path / "base")
    run = tmp_path / "run" / "checkpoints"
    save(run / "30" / "items", linen_state(maxtext_tree(source, scan=True)), use_ocdbt=True, use_zarr3=True)
    (run / "4").mkdir()
    command = ["convert", f"maxtext:{run}", str(tmp_path / "out"), "--config", str(tmp_path / "base")]
    assert main([*command, "--format", "safetensors", "--dtype", "bfloat16"]) == 0
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(source.path))
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_ocdbt": True, "use_zarr3": False}], ids=["files", "zarr 2"])
@pytest.mark.parametrize("kind", ["maxtext", "gemma"])
def test_every_storage_of_orbax_is_read(kind, options, tmp_path, source_of):
    source = source_of("gemma3", "default")
    if kind == "maxtext":
        out = save(tmp_path / "0" / "items", nnx_state(maxtext_tree(source, scan=False)), **options)
        assert_same_model(maxtext.open_maxtext(out.parent, source.path), source, rtol=1e-6)
    else:
        out = save(tmp_path / "gm", gemma_flat(gemma_tree(source)), **options)
        assert_same_model(gemma_library.open_gemma(out, source.path), source)


def test_the_last_step_of_a_run_is_found(tmp_path):
    for step in (
        "run/9/items",
        "run/30/items",
        "kauldron/checkpoints/ckpt_4/default",
        "kauldron/checkpoints/ckpt_12/default",
    ):
        (tmp_path / step).mkdir(parents=True)
    assert maxtext.items_folder(tmp_path / "run") == tmp_path / "run/30/items"
    assert maxtext.items_folder(tmp_path / "kauldron") == tmp_path / "kauldron/checkpoints/ckpt_12/default"
    assert maxtext.items_folder(tmp_path / "kauldron/checkpoints/ckpt_4") == tmp_path / "kauldron/checkpoints/ckpt_4/default"


def test_arrays_that_do_not_fit_the_config_are_refused(source_of):
    source = source_of("llama", "default")
    good = maxtext_tree(source, scan=True)

    def changed(change) -> Tree:
        tree = jax.tree.map(lambda x: x, good)
        change(tree["decoder"])
        return {"params": tree}

    def shorten(decoder: Tree) -> None:
        query = decoder["layers"]["self_attention"]["query"]
        query["kernel"] = query["kernel"][:, :, :, :-1]

    def drop_layer(decoder: Tree) -> None:
        decoder["layers"] = jax.tree.map(lambda x: x[:, :1], decoder["layers"])

    changes = {
        "has no tensor 'params.decoder.logits_dense.kernel'": lambda decoder: decoder.pop("logits_dense"),
        "'params.decoder.layers.self_attention.query.kernel' has shape": shorten,
        "with an axis of at least 2 layers": drop_layer,
        r"has 1 arrays that the config does not explain \(params.decoder.extra.scale\)": lambda decoder: decoder.update(
            extra={"scale": np.zeros(3, np.float32)}
        ),
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            in_memory(source, changed(change), maxtext.layout)
    with pytest.raises(ValueError, match="not a checkpoint of MaxText"):
        in_memory(source, {"a": np.zeros(3)}, maxtext.layout)
    with pytest.raises(ValueError, match="not for 'llama'"):
        in_memory(source, good, gemma_library.layout)
    other = Source(folder("opt", "default"))
    with pytest.raises(ValueError, match="not for 'opt'"):
        in_memory(other, good, maxtext.layout)


def test_the_commands_errors_name_the_remedy(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    base = str(folder("llama", "default"))
    cases = {
        "requires the model's config.json": ["convert", f"maxtext:{tmp_path}", str(tmp_path / "out")],
        "cannot be read as an Orbax checkpoint": [
            "convert",
            f"gm:{tmp_path}/empty",
            str(tmp_path / "out"),
            "--config",
            base,
        ],
        "is not a directory": ["convert", f"maxtext:{tmp_path}/none", str(tmp_path / "out"), "--config", base],
        "--config belongs to": ["convert", base, str(tmp_path / "out"), "--config", base],
    }
    for message, command in cases.items():
        assert main(command) == 2
        assert message in capsys.readouterr().err
