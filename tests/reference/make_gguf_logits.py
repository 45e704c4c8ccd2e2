"""Regenerates `gguf/logits.npz`: the logits that llama.cpp computes for the tiny GGUF files.

    python tests/reference/make_gguf_logits.py [NAME ...]     # needs llama-cpp-python; the tests do not

For each file: "NAME.tokens" i32[T] and "NAME.logits" f32[R, V], for the last R tokens of a prompt of T tokens. Weights and
cache are float32, because llama.cpp rounds the activations too if the weights are float16. Metadata that llama.cpp requires
but its converter omits is added. Models that llama.cpp cannot load are skipped: command-r with norms on heads, OLMoE with
grouped heads, Phi-2 with an MLP that is not four times as wide, DeepSeek V2 Lite with fewer layers than the release, and
Gemma 3n with other sizes than the release. It loads two others, but computes another model: Phi-3.5-MoE without SparseMixer,
and Baichuan without a rotary embedding, which it has with 32 layers only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as lib
import numpy as np

VOCABULARY = 280
ANOTHER_MODEL = ("phimoe", "baichuan")
NUM_TOKENS, NUM_ROWS = 48, 8  # longer than the windows (32), shorter than the trained lengths that YaRN extends


def widened(source: Path, target: Path) -> None:
    """Writes a copy of a GGUF file with all tensors in float32 and the metadata that llama.cpp requires."""
    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, kind)
    add = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
    for name, field in reader.fields.items():
        if name.startswith((f"{kind}.", "xielu.")):
            value = field.contents()
            writer.add_array(name, value) if isinstance(value, list) else add[type(value)](name, value)
    if f"{kind}.vocab_size" not in reader.fields:
        writer.add_vocab_size(VOCABULARY)
    if kind == "qwen":
        writer.add_layer_norm_rms_eps(reader.fields["qwen.attention.layer_norm_epsilon"].contents())
    writer.add_tokenizer_model("no_vocab")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(file: Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [T, V] of `tokens`."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_mmap = 0, False
    model = lib.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise ValueError(f"llama.cpp does not load {file}")
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 128
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # F32
    options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    if lib.llama_decode(context, batch):
        raise ValueError(f"llama.cpp does not run {file}")
    found = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), VOCABULARY)).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return found


def main() -> None:
    """Runs every file that llama.cpp can load, and prints the others."""
    home = Path(__file__).with_name("gguf")
    saved = dict(np.load(home / "logits.npz")) if sys.argv[1:] else {}
    for file in sorted(home.glob("*.gguf")):
        if file.stem in ANOTHER_MODEL:
            continue
        if sys.argv[1:] and file.stem not in sys.argv[1:]:
            continue
        tokens = np.random.default_rng(0).integers(3, VOCABULARY, NUM_TOKENS, dtype=np.int32)
        try:
            with tempfile.TemporaryDirectory() as folder:
                widened(file, Path(folder, file.name))
                rows = logits(Path(folder, file.name), tokens)[-NUM_ROWS:]
        except ValueError as error:
            print(error)
            continue
        saved |= {f"{file.stem}.tokens": tokens, f"{file.stem}.logits": rows}
        print(f"{file.stem}: logits in [{rows.min():.1f}, {rows.max():.1f}]")
    np.savez_compressed(home / "logits.npz", **saved)


if __name__ == "__main__":
    main()
