"""The declarations of a tower's weights, with their names in a checkpoint."""

from __future__ import annotations

from functools import partial

from fastgen_jax.models.vision.config import QwenVisionConfig, SiglipConfig, TowerConfig, TowerWeight

_LAYER = "vision_tower.encoder.layers.{number}"
_QWEN_LAYER = "visual.blocks.{number}"


def weights(config: TowerConfig) -> dict[str, TowerWeight]:
    """The weights of the tower by their paths, in which a dot leads to a group of stacked ones."""
    return qwen_weights(config) if isinstance(config, QwenVisionConfig) else siglip_weights(config)


def siglip_weights(config: SiglipConfig) -> dict[str, TowerWeight]:
    """The weights by their paths in the tree of `siglip.embed`; those below "layers" are stacked over the layers."""
    e, f, p = config.embed_dim, config.mlp_dim, config.patch_size
    of_layer = partial(TowerWeight, count=config.num_layers)
    found = {
        "patch": TowerWeight(tensor="vision_tower.embeddings.patch_embedding.weight", shape=(e, 3, p, p), is_matrix=True),
        "patch_bias": TowerWeight(tensor="vision_tower.embeddings.patch_embedding.bias", shape=(e,)),
        "positions": TowerWeight(
            tensor="vision_tower.embeddings.position_embedding.weight", shape=(config.patches_per_side**2, e)
        ),
        "post_norm": TowerWeight(tensor="vision_tower.post_layernorm.weight", shape=(e,)),
        "post_norm_bias": TowerWeight(tensor="vision_tower.post_layernorm.bias", shape=(e,)),
        "projector_norm": TowerWeight(tensor="multi_modal_projector.mm_soft_emb_norm.weight", shape=(e,)),
        "projector": TowerWeight(tensor="multi_modal_projector.mm_input_projection_weight", shape=(e, config.text_dim)),
    }
    for name, module, outputs, inputs in (
        ("q", "self_attn.q_proj", e, e),
        ("k", "self_attn.k_proj", e, e),
        ("v", "self_attn.v_proj", e, e),
        ("o", "self_attn.out_proj", e, e),
        ("up", "mlp.fc1", f, e),
        ("down", "mlp.fc2", e, f),
    ):
        found[f"layers.{name}"] = of_layer(tensor=f"{_LAYER}.{module}.weight", shape=(outputs, inputs), is_matrix=True)
        found[f"layers.{name}_bias"] = of_layer(tensor=f"{_LAYER}.{module}.bias", shape=(outputs,))
    for name, module in (("attn_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        found[f"layers.{name}"] = of_layer(tensor=f"{_LAYER}.{module}.weight", shape=(e,))
        found[f"layers.{name}_bias"] = of_layer(tensor=f"{_LAYER}.{module}.bias", shape=(e,))
    return found


def qwen_weights(config: QwenVisionConfig) -> dict[str, TowerWeight]:
    """The same for `qwen.embed`; those below "deep" are stacked over the layers whose results are also merged."""
    e, f, p = config.embed_dim, config.mlp_dim, config.patch_size
    wide = e * config.merge**2
    is_layer_norm = config.norm == "layer"
    is_qwen3 = config.position_side is not None
    found = {
        "patch": TowerWeight(tensor="visual.patch_embed.proj.weight", shape=(e, 3, config.frames, p, p), is_matrix=True)
    }
    if config.patch_bias:
        found["patch_bias"] = TowerWeight(tensor="visual.patch_embed.proj.bias", shape=(e,))
    if config.position_side is not None:
        found["positions"] = TowerWeight(tensor="visual.pos_embed.weight", shape=(config.position_side**2, e))

    def add_linear(path: str, tensor: str, outputs: int, inputs: int, count: int | None = None) -> None:
        found[path] = TowerWeight(tensor=f"{tensor}.weight", shape=(outputs, inputs), is_matrix=True, count=count)
        found[f"{path}_bias"] = TowerWeight(tensor=f"{tensor}.bias", shape=(outputs,), count=count)

    def add_norm(path: str, tensor: str, size: int, count: int | None = None) -> None:
        found[path] = TowerWeight(tensor=f"{tensor}.weight", shape=(size,), count=count)
        if is_layer_norm:
            found[f"{path}_bias"] = TowerWeight(tensor=f"{tensor}.bias", shape=(size,), count=count)

    mlp = (
        (("up", "linear_fc1", f, e), ("down", "linear_fc2", e, f))
        if is_qwen3
        else (("up", "fc1", f, e), ("down", "fc2", e, f))
    )
    if config.is_gated:
        mlp = (("gate", "gate_proj", f, e), ("up", "up_proj", f, e), ("down", "down_proj", e, f))
    add_norm("layers.attn_norm", f"{_QWEN_LAYER}.norm1", e, config.num_layers)
    add_norm("layers.mlp_norm", f"{_QWEN_LAYER}.norm2", e, config.num_layers)
    add_linear("layers.qkv", f"{_QWEN_LAYER}.attn.qkv", 3 * e, e, config.num_layers)
    add_linear("layers.o", f"{_QWEN_LAYER}.attn.proj", e, e, config.num_layers)
    for name, module, outputs, inputs in mlp:
        add_linear(f"layers.{name}", f"{_QWEN_LAYER}.mlp.{module}", outputs, inputs, config.num_layers)
    norm, up, down = ("norm", "linear_fc1", "linear_fc2") if is_qwen3 else ("ln_q", "mlp.0", "mlp.2")
    add_norm("merger_norm", f"visual.merger.{norm}", e)
    add_linear("merger_up", f"visual.merger.{up}", wide, wide)
    add_linear("merger_down", f"visual.merger.{down}", config.text_dim, wide)
    if config.deep_layers:
        merger, count = "visual.deepstack_merger_list.{number}", len(config.deep_layers)
        add_norm("deep.norm", f"{merger}.{norm}", wide, count)
        add_linear("deep.up", f"{merger}.{up}", wide, wide, count)
        add_linear("deep.down", f"{merger}.{down}", config.text_dim, wide, count)
    return found
