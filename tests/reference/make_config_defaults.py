"""Regenerates config_defaults.json: the config of each family with the defaults of transformers for every field.

python tests/reference/make_config_defaults.py          # needs transformers; the tests do not
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastgen_jax.models.families import FAMILIES

OUTPUT = Path(__file__).with_name("config_defaults.json")
# Where it is not the name of the family.
MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
}
NOT_IN_TRANSFORMERS = ("qwen", "baichuan", "internlm2", "internlm3", "minicpm")
MULTIMODAL = ("llava", "qwen3_vl_moe")  # their fields are in those of a text model


def main() -> None:
    configs = {}
    for family in sorted(FAMILIES.keys() - {*NOT_IN_TRANSFORMERS, *MULTIMODAL}):
        config = CONFIG_MAPPING[MODEL_TYPES.get(family, family)]()
        configs[family] = json.loads(config.to_json_string(use_diff=False))
    OUTPUT.write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
