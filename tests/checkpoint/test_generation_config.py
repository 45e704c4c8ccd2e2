"""The sampling defaults of checkpoints of every format, and how they reach the config of the engine."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest

from fastgen_jax import EngineConfig
from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.core.progress import Phases
from fastgen_jax.engine import startup
from fastgen_jax.engine.generation import defaults_of_model
from fastgen_jax.engine.weights import host_leaf
from tests.checkpoint.tiny_files import write_gguf, write_hf
from tests.text.vocabularies import gguf_metadata, write_json

VOCAB = 512
SMALL = {"token_budget": 16, "num_blocks": 8}
GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "max_new_tokens": 64,
    "max_length": 4096,
    "transformers_version": "4.50.0",
}
DEFAULTS = (("temperature", 0.6), ("top_k", 20), ("top_p", 0.9), ("repetition_penalty", 1.05), ("max_new_tokens", 64))


@pytest.fixture
def source(tmp_path):
    write_hf(tmp_path / "source", vocab_size=VOCAB)
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(GENERATION))
    return write_json(tmp_path / "source")


def defaults_of(model, **options):
    """What an engine for this model is started with."""
    return startup.load(model, EngineConfig(**SMALL, **options), phases=Phases(logging.getLogger(__name__), bar=False))[
        3
    ].generation_config


def test_a_directory_provides_defaults_unless_they_are_turned_off_or_replaced(source):
    assert defaults_of(source) == DEFAULTS
    assert defaults_of(source, generation_config="none") == "none"
    assert defaults_of(source, generation_config={"temperature": 0.1}) == (("temperature", 0.1),)
    assert open_checkpoint(source).config.eos_token_ids == (2, 5)  # always: the model ends its answers with them
    (source / "generation_config.json").unlink()
    assert defaults_of(source) == ()


def test_a_snapshot_keeps_the_defaults_even_if_made_from_a_snapshot_or_by_an_older_version(source, tmp_path):
    prepare = partial(host_leaf, dtype="float32", quantize=None)
    convert(open_checkpoint(source), tmp_path / "one", prepare=prepare)
    assert defaults_of(tmp_path / "one") == DEFAULTS
    convert(open_checkpoint(tmp_path / "one"), tmp_path / "two", prepare=prepare)
    assert defaults_of(tmp_path / "two") == DEFAULTS
    (tmp_path / "one" / "generation_config.json").unlink()  # as older versions wrote them: only next to the tokenizer
    assert defaults_of(tmp_path / "one") == DEFAULTS


def test_a_gguf_file_and_its_snapshot_have_the_defaults_under_gguf_names(tmp_path):
    sampling = {"temp": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "penalty_repeat": 1.05}
    vocabulary = gguf_metadata("llama")
    write_gguf(
        tmp_path / "model.gguf",
        vocab_size=len(vocabulary["tokenizer.ggml.tokens"]),
        arrays=vocabulary,
        metadata={f"general.sampling.{name}": value for name, value in sampling.items()},
    )
    wanted = (("temperature", 0.6), ("top_k", 20), ("top_p", 0.9), ("repetition_penalty", 1.05))
    assert defaults_of(tmp_path / "model.gguf") == wanted
    convert(
        open_checkpoint(tmp_path / "model.gguf"),
        tmp_path / "snapshot",
        prepare=partial(host_leaf, dtype="float32", quantize=None),
    )
    assert defaults_of(tmp_path / "snapshot") == wanted


@pytest.mark.parametrize(
    ("raw", "defaults"),
    [
        ({}, ()),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "do_sample": True}, ()),
        ({"temperature": None, "top_k": None}, ()),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, (("temperature", 0.0),)),
        ({"temperature": 0.0, "top_p": 0.9}, (("temperature", 0.0),)),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "max_length": 20}, ()),
    ],
)
def test_only_what_changes_the_text_becomes_a_default(raw, defaults, caplog):
    with caplog.at_level(logging.WARNING, "fastgen_jax"):
        assert defaults_of_model(raw, "there") == defaults
    assert not caplog.records


def test_unsupported_defaults_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "fastgen_jax"):
        assert defaults_of_model({"num_beams": 4, "suppress_tokens": [1], "temperature": 0.5}, "there") == (
            ("temperature", 0.5),
        )
    assert "there has options that are not supported and are ignored: num_beams=4, suppress_tokens=[1]" in caplog.text


def test_a_value_out_of_range_is_refused_with_the_remedy(source):
    (source / "generation_config.json").write_text('{"top_p": 90}')
    with pytest.raises(ValueError, match=r"source cannot be used: top_p is 90; .* start with generation_config='none'"):
        defaults_of(source)
    assert defaults_of(source, generation_config="none") == "none"
