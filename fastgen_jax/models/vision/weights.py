"""The declarations of a tower's weights, with their names in a checkpoint."""

from __future__ import annotations

from fastgen_jax.models.vision.config import SiglipConfig, TowerWeight

_LAYER = "vision_tower.encoder.layers.{layer}"


def siglip_weights(config: SiglipConfig) -> dict[str, TowerWeight]:
    """The weights by their paths in the tree of `siglip.embed`; those below "layers" are stacked over the layers."""
    e, f, p = config.embed_dim, config.mlp_dim, config.patch_size
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
        found[f"layers.{name}"] = TowerWeight(tensor=f"{_LAYER}.{module}.weight", shape=(outputs, inputs), is_matrix=True)
        found[f"layers.{name}_bias"] = TowerWeight(tensor=f"{_LAYER}.{module}.bias", shape=(outputs,))
    for name, module in (("attn_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        found[f"layers.{name}"] = TowerWeight(tensor=f"{_LAYER}.{module}.weight", shape=(e,))
        found[f"layers.{name}_bias"] = TowerWeight(tensor=f"{_LAYER}.{module}.bias", shape=(e,))
    return found
