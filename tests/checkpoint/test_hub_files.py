from __future__ import annotations

import pytest

from fastgen_jax.checkpoint.hub_files import files_of_model

SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
TOKENIZER = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]


@pytest.mark.parametrize(
    ("model", "besides"),
    [
        # gpt-oss: the weights once more, in the layout of its own code, and as ONNX
        (
            ["config.json", "chat_template.jinja", "model.safetensors.index.json", *SHARDS, *TOKENIZER],
            ["original/config.json", "original/model.safetensors", "metal/model.bin", "onnx/model.onnx", "README.md"],
        ),
        # Mistral: the weights once more in one file, with their own config
        (
            ["config.json", "generation_config.json", "model.safetensors.index.json", *SHARDS, "tekken.json"],
            ["consolidated.safetensors", "params.json", "consolidated.safetensors.index.json"],
        ),
        # GPT-2: other frameworks
        (
            ["config.json", "model.safetensors", *TOKENIZER],
            ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "64.tflite"],
        ),
        # OPT: no safetensors
        (
            ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "merges.txt"],
            ["tf_model-00001-of-00002.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt", "LICENSE.md"],
        ),
        # a fine-tuned model with its adapter, and a quantized copy
        (
            ["config.json", "model.safetensors", "tokenizer.model"],
            ["adapter_model.safetensors", "adapter_config.json", "model-Q8_0.gguf", ".gitattributes"],
        ),
        (["config.json", "pytorch_model.bin", "qwen.tiktoken"], ["checkpoint-100/model.safetensors"]),
        # several chat templates
        (
            ["additional_chat_templates/rag.jinja", "chat_template.json", "config.json", "model.safetensors", *TOKENIZER],
            ["checkpoint-100/additional_chat_templates/rag.jinja", "additional_chat_templates/README.md"],
        ),
    ],
)
def test_a_model_is_its_config_its_tokenizer_and_one_copy_of_its_weights(model, besides):
    assert files_of_model([*besides, *model]) == sorted(model)


GGUFS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]


def test_a_gguf_file_is_chosen_by_a_word_of_its_name():
    names = [*GGUFS, "README.md", "config.json", "mmproj-m-f16.gguf"]
    assert files_of_model(names, variant="q4_k_m") == ["m-Q4_K_M.gguf"]
    assert files_of_model(names, variant="Q8_0") == GGUFS[2:]
    assert files_of_model(["only-F16.gguf", "README.md"]) == ["only-F16.gguf"]
    assert files_of_model(["config.json", "tokenizer.json", "only-F16.gguf"]) == ["only-F16.gguf"]


@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        (GGUFS, None, r"it has 3 GGUF files; append .* as in :Q4_K_M \(Q8_0/m-Q8_0, m-Q4_K_M, m-Q4_K_S\)"),
        (GGUFS, "Q4_K", "0 of its GGUF files are called 'Q4_K'; append one of their names"),
        (["m-Q4_0.gguf", "n-Q4_0.gguf"], "Q4_0", "2 of its GGUF files are called 'Q4_0'"),
        (["config.json", "model.safetensors"], "Q4_0", r"0 of its GGUF files are called 'Q4_0'.*\(none\)"),
        (["adapter_config.json", "adapter_model.safetensors"], None, "it is a LoRA adapter, not a model"),
        (["config.json", "model.onnx"], None, "a config.json but no weights"),
        (["README.md"], None, "neither a config.json nor a GGUF file"),
    ],
)
def test_what_is_no_model_or_not_one_is_refused(names, variant, message):
    with pytest.raises(ValueError, match=message):
        files_of_model(names, variant=variant)
