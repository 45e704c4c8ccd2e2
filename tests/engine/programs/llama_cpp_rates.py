"""llama.cpp with random weights in float32, for `tests.engine.state_throughput`: one process, one model, two threads.

Its Python has llama-cpp-python and gguf. The argument is JSON: `kind` (granitehybrid or llama), `vocab`, `layers`,
`width`, `mlp`, `heads`, `kv_heads`, `attends` (whether each layer has attention), `requests`, `context`, and for states
`groups`, `conv`, `state`, `inner`, `ssm_heads`. For every line "REQUESTS PROMPT NEW" on standard input it answers with the
seconds that so many requests took.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as lib
import numpy as np

BATCH = 2048
THREADS = 2


def shapes(of: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, with rows first."""
    width, mlp, vocab = of["width"], of["mlp"], of["vocab"]
    head_dim = width // of["heads"]
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    for layer, attends in enumerate(of["attends"]):
        parts: dict[str, tuple[int, ...]] = {"attn_norm.weight": (width,), "ffn_norm.weight": (width,)}
        parts |= {"ffn_gate.weight": (mlp, width), "ffn_up.weight": (mlp, width), "ffn_down.weight": (width, mlp)}
        if attends:
            kv = of["kv_heads"] * head_dim
            parts |= {"attn_q.weight": (width, width), "attn_k.weight": (kv, width), "attn_v.weight": (kv, width)}
            parts |= {"attn_output.weight": (width, width)}
        else:
            inner, heads = of["inner"], of["ssm_heads"]
            mixed = inner + 2 * of["groups"] * of["state"]
            parts |= {"ssm_in.weight": (inner + mixed + heads, width), "ssm_out.weight": (width, inner)}
            parts |= {"ssm_conv1d.weight": (mixed, of["conv"]), "ssm_conv1d.bias": (mixed,)}
            parts |= {"ssm_a": (heads, 1), "ssm_d": (heads, 1), "ssm_dt.bias": (heads,)}
            parts |= {"ssm_norm.weight": (of["groups"], inner // of["groups"])}
        found |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return found


def write(of: dict[str, Any], file: Path) -> None:
    """A GGUF file with random weights."""
    writer = gguf.GGUFWriter(file, of["kind"])
    writer.add_block_count(of["layers"])
    writer.add_context_length(of["context"])
    writer.add_embedding_length(of["width"])
    writer.add_feed_forward_length(of["mlp"])
    writer.add_head_count(of["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(of["vocab"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_head_count_kv([of["kv_heads"] if attends else 0 for attends in of["attends"]])
    if of["kind"] == "granitehybrid":
        writer.add_rope_dimension_count(of["width"] // of["heads"])
        writer.add_ssm_conv_kernel(of["conv"])
        writer.add_ssm_state_size(of["state"])
        writer.add_ssm_group_count(of["groups"])
        writer.add_ssm_inner_size(of["inner"])
        writer.add_ssm_time_step_rank(of["ssm_heads"])
        writer.add_rope_scaling_finetuned(False)
        writer.add_logit_scale(8.0)
        writer.add_embedding_scale(12.0)
        writer.add_residual_scale(0.22)
        writer.add_attention_scale(1 / 64)
    rng = np.random.default_rng(0)
    for name, shape in shapes(of).items():
        values = np.ones(shape) if name.endswith("norm.weight") else rng.standard_normal(shape) * 0.02
        writer.add_tensor(name, (-np.exp(values) if name.endswith("ssm_a") else values).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model and a context with room for `requests` sequences."""

    def __init__(self, file: Path, *, requests: int, context: int, vocab: int):
        loading = lib.llama_model_default_params()
        loading.n_gpu_layers, loading.use_mmap = 0, False
        self.model = lib.llama_model_load_from_file(str(file).encode(), loading)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = requests * context, BATCH, 512
        options.n_seq_max = requests
        options.n_threads = options.n_threads_batch = THREADS
        options.type_k = options.type_v = 0  # float32
        self.context = lib.llama_init_from_model(self.model, options)
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.vocab = vocab

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes (token, position, sequence, whether to sample) and returns the likeliest tokens."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, sampled) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, sampled
            batch.seq_id[i][0] = sequence
        if lib.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp did not compute a batch")
        rows = [i for i, (*_, sampled) in enumerate(tokens) if sampled]
        return [
            int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, row), (self.vocab,)).argmax()) for row in rows
        ]

    def seconds(self, requests: int, prompt_tokens: int, new_tokens: int) -> float:
        """The time for `requests` prompts, and `new_tokens` greedy tokens of each."""
        prompts = np.random.default_rng(requests).integers(5, self.vocab, (requests, prompt_tokens)).tolist()
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        at_once = max(1, BATCH // prompt_tokens)
        start = time.perf_counter()
        last: list[int] = []
        for first in range(0, requests, at_once):
            last += self.decode(
                [
                    (token, position, sequence, position == prompt_tokens - 1)
                    for sequence, prompt in enumerate(prompts[first : first + at_once], first)
                    for position, token in enumerate(prompt)
                ]
            )
        for position in range(prompt_tokens, prompt_tokens + new_tokens - 1):
            last = self.decode([(token, position, sequence, True) for sequence, token in enumerate(last)])
        return time.perf_counter() - start


def main() -> None:
    of = json.loads(sys.argv[1])
    silence = lib.llama_log_callback(lambda *_: None)  # llama.cpp keeps a pointer to it
    lib.llama_log_set(silence, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write(of, file)
        engine = LlamaCpp(file, requests=of["requests"], context=of["context"], vocab=of["vocab"])
    print(lib.llama_model_n_params(engine.model), flush=True)
    for line in sys.stdin:
        print(engine.seconds(*map(int, line.split())), flush=True)


if __name__ == "__main__":
    main()
