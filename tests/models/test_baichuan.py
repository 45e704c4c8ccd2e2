"""Baichuan 2, which is recognized by the size of its vocabulary: its head has columns of length 1."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.models.families import FAMILIES, baichuan
from tests.models.parity import Runs, error, expected, folder


def test_the_head_of_version_2_is_normalized(monkeypatch):
    tokens, want, prompt = expected("baichuan", "7b")
    monkeypatch.setattr(baichuan, "VOCAB_SIZE_2", want.shape[1])
    checkpoint = open_checkpoint(folder("baichuan", "7b"))
    lengths = np.linalg.norm(checkpoint.read("lm_head.weight").astype(np.float64), axis=1)
    params = load_params(checkpoint, dtype="float32", stack_layers=False)
    got = Runs(params, checkpoint.config, len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
    assert error(got, want / lengths[None, :]) < 1e-4
    assert error(got, want) > 1e-2


def test_a_head_in_blocks_is_refused(monkeypatch):
    checkpoint = open_checkpoint(folder("baichuan", "7b"))
    monkeypatch.setattr(baichuan, "VOCAB_SIZE_2", checkpoint.config.vocab_size)
    order = FAMILIES["baichuan"].sources(checkpoint.config)["lm_head"].rearrange
    with pytest.raises(ValueError, match="must not be quantized"):
        order(np.arange(checkpoint.config.vocab_size))
