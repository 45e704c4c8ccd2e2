from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastgen_jax.cli import main
from tests.checkpoint.quantized_files import SETTINGS, quantized_folder, tensors_of
from tests.checkpoint.tiny_files import write_gguf, write_hf
from tests.text.vocabularies import gguf_metadata, write_json

REFERENCE = Path(__file__).parents[1] / "reference" / "families"


def _lines(capsys, *arguments) -> dict[str, str]:
    assert main(["inspect", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.strip().split("  ")[0]: line.strip().split("  ", 1)[-1].strip() for line in lines}


def test_a_directory_is_described_without_reading_a_weight(tmp_path, capsys, monkeypatch):
    write_hf(tmp_path, vocab_size=512, dtype="float16")
    write_json(tmp_path, chat_template="{{ messages }}")
    monkeypatch.setattr("fastgen_jax.checkpoint.huggingface.HuggingFaceCheckpoint.read", None)
    lines = _lines(capsys, tmp_path)
    assert lines["architecture"] == "LlamaForCausalLM"
    # embedding and head, final norm, and a layer's two norms, q and o, k and v, gate, up and down, three times
    assert lines["parameters"] == f"{2 * 512 * 32 + 32 + 3 * (2 * 32 + 2 * 64 * 32 + 2 * 32 * 32 + 3 * 64 * 32):,}"
    assert lines["stored as"] == "float16 100.0 %"
    assert lines["weight bytes"] == "279,424 as float32, 139,712 as bfloat16"
    # 3 layers, K and V, 2 heads of 16, as int8 with a float32 scale each
    assert lines["KV bytes/token"] == "768 as float32, 384 as bfloat16, 240 as int8"
    assert lines["tokenizer"].startswith("tokenizer.json (byte-level BPE), 380 tokens, bos 0, eos (1, 2)")
    assert lines["chat templates"] == "default"
    assert lines["num_heads"] == "4"
    assert lines["sampling"] == "no defaults: temperature 1, all tokens kept"
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 1.0}')
    assert _lines(capsys, tmp_path)["sampling"] == "temperature 0.6, top_k 20"
    (tmp_path / "generation_config.json").write_text('{"top_p": 90}')
    assert _lines(capsys, tmp_path)["sampling"].startswith("none: the sampling defaults of")


def test_a_gguf_file_shows_its_block_types_even_without_a_tokenizer(tmp_path, capsys):
    write_gguf(tmp_path / "a.gguf", kind="Q8_0", vocab_size=512, arrays=gguf_metadata("qwen2"))
    lines = _lines(capsys, tmp_path / "a.gguf")
    assert lines["stored as"].startswith("Q8_0 99.")
    assert lines["loaded as"].startswith("CPUs with native kernels: ")
    write_gguf(tmp_path / "tied.gguf", kind="Q8_0", vocab_size=512, tie_word_embeddings=True)
    tied = _lines(capsys, tmp_path / "tied.gguf")
    share = tied["stored as"].split()[1]
    assert tied["loaded as"].startswith(f"CPUs with native kernels: {share} % in Q8_0"), "the head is the embedding"
    assert lines["tokenizer"].startswith("byte-level BPE from GGUF, pre-tokenizer qwen2")
    assert lines["chat templates"] == "none"
    write_gguf(tmp_path / "b.gguf")
    assert _lines(capsys, tmp_path / "b.gguf")["tokenizer"].startswith("none: ")


def test_a_quantized_directory_shows_its_format_and_what_it_becomes(tmp_path, capsys):
    lines = _lines(capsys, REFERENCE / "qwen3" / "compressed")
    assert lines["quantization"] == "compressed-tensors (format=mixed-precision)"
    assert lines["stored as"] == "int8 33.9 %, INT4 28.3 %, bfloat16 23.7 %, float8_e4m3fn 14.1 %"
    assert lines["loaded as"] == (
        "CPUs with native kernels: 33.9 % in 8 bits in groups of 32, float32 scales (9.00 bits each), "
        "28.3 % in 4 bits and float32 offsets in groups of 32 (6.00 bits each); else dequantized"
    )
    lines = _lines(capsys, REFERENCE / "qwen2" / "nf4")
    assert lines["quantization"].startswith("bitsandbytes (load_in_4bit=True, ")
    assert lines["stored as"] == "NF4 89.4 %, float32 10.6 %"
    assert lines["loaded as"].startswith(
        "CPUs with native kernels: 89.4 % in NF4 in groups of 64, float32 scales (4.50 bits"
    )
    parts = {name: np.array(tensor.map()) for name, tensor in tensors_of("fp4", "").items()}
    quantized_folder(tmp_path / "fp4", SETTINGS["fp4"], parts, intermediate_size=32)
    write_json(tmp_path / "fp4")
    assert _lines(capsys, tmp_path / "fp4")["loaded as"] == "dequantized"
    lines = _lines(capsys, REFERENCE / "gpt_oss" / "mxfp4")  # experts only
    assert lines["loaded as"] == (
        "CPUs with native kernels: 62.5 % in 4-bit floats in groups of 32 (4.25 bits each); else dequantized"
    )
    write_gguf(tmp_path / "a.gguf", kind="Q8_0", vocab_size=512)
    lines = _lines(capsys, tmp_path / "a.gguf")
    assert "quantization" not in lines
    assert lines["loaded as"].startswith("CPUs with native kernels: ")


def test_the_template_is_printed_on_request(tmp_path, capsys):
    write_hf(tmp_path, vocab_size=512)
    write_json(tmp_path, chat_template="{{ messages }}")
    assert main(["inspect", str(tmp_path), "--template"]) == 0
    assert capsys.readouterr().out.endswith("--- default\n{{ messages }}\n")


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_user_error_is_one_line_and_exit_code_2(tmp_path, capsys, command):
    arguments = [command, str(tmp_path / "absent"), *([str(tmp_path / "out")] if command == "convert" else [])]
    assert main(arguments) == 2
    assert "it is neither an existing directory" in capsys.readouterr().err
