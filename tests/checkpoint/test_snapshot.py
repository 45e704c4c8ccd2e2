from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, Research, SamplingParams, pipeline
from fastgen_jax.checkpoint import load_params, open_checkpoint, resolve_model, save_snapshot
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.checkpoint.orbax_arrays import open_arrays, read_array
from fastgen_jax.cli import main
from fastgen_jax.engine.weights import host_leaf
from fastgen_jax.text import load_tokenizer
from pallas_kernels.matmul import Int8Weight
from tests.checkpoint.tiny_files import write_gguf, write_hf
from tests.text.vocabularies import gguf_metadata, write_json

VOCAB = 512  # rows of the embedding, enough for the tokenizers of tests.text
ENGINE = {"token_budget": 16, "budget_ladder": (16,), "max_num_seqs": 2, "block_size": 4, "num_blocks": 32}


def _source(path: Path, **overrides) -> Path:
    """A Hugging Face directory with a tokenizer."""
    write_hf(path, vocab_size=VOCAB, num_hidden_layers=2, **overrides)
    return write_json(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return _source(tmp_path_factory.mktemp("source"))


def _snapshot(source: Path, out: Path, *, dtype: str = "float32", quantize: str | None = None) -> Path:
    convert(open_checkpoint(source), out, prepare=partial(host_leaf, dtype=dtype, quantize=quantize))
    return out


@pytest.fixture(scope="module")
def snapshot(source, tmp_path_factory) -> Path:
    return _snapshot(source, tmp_path_factory.mktemp("snapshots") / "float32")


@pytest.fixture(scope="module")
def int8_snapshot(source, tmp_path_factory) -> Path:
    return _snapshot(source, tmp_path_factory.mktemp("snapshots") / "int8", quantize="int8")


@pytest.mark.parametrize("stack_layers", [False, True])
def test_a_snapshot_loads_as_the_checkpoint_that_it_was_made_from(source, snapshot, stack_layers):
    one, other = (
        load_params(open_checkpoint(path), dtype=jnp.float32, stack_layers=stack_layers) for path in (source, snapshot)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert open_checkpoint(source).config == open_checkpoint(snapshot).config


def test_the_dtype_of_a_snapshot_is_converted_while_it_is_read(source, snapshot, tmp_path):
    narrow = _snapshot(source, tmp_path / "out", dtype="bfloat16")
    assert open_checkpoint(narrow).dtype("layers.qkv.0") == "bfloat16"
    params = load_params(open_checkpoint(narrow), dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    whole = load_params(open_checkpoint(snapshot), dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_params_are_saved_alike_stacked_or_not(source, snapshot, tmp_path):
    checkpoint = open_checkpoint(source)
    params = load_params(checkpoint, dtype=jnp.float32, stack_layers=True)
    save_snapshot(tmp_path / "out", params, checkpoint.config_json, tokenizer_files={})
    one, other = (load_params(open_checkpoint(path), dtype=jnp.float32) for path in (snapshot, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_command_makes_a_snapshot_that_the_pipeline_runs(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "wrote" in capsys.readouterr().out
    options = {"max_new_tokens": 8, "do_sample": False, "ignore_eos": True}
    answers = [pipeline(path, progress=False, **ENGINE)("The quick", **options)[0] for path in (source, tmp_path / "out")]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].generated_text == answers[1].generated_text


def test_an_int8_snapshot_runs_as_the_checkpoint_quantized_while_loading(source, int8_snapshot):
    checkpoint = open_checkpoint(int8_snapshot)
    assert checkpoint.dtype("layers.o.1") == "int8"
    assert isinstance(load_params(checkpoint, dtype=jnp.float32)["layers"]["qkv"], Int8Weight)
    engines = [Engine.from_pretrained(source, quantize="int8", **ENGINE), Engine.from_pretrained(int8_snapshot, **ENGINE)]
    assert engines[1].config.quantize == "int8"
    logits = [Research(engine).put(["a"], [[5, 6, 7, 8]]) for engine in engines]
    np.testing.assert_array_equal(*logits)


def test_a_snapshot_of_int8_weights_does_not_depend_on_the_order_of_their_axes(int8_snapshot, tmp_path):
    checkpoint = open_checkpoint(int8_snapshot)
    params = load_params(checkpoint, dtype=jnp.float32)

    def inputs_last(leaf):
        if not isinstance(leaf, Int8Weight):
            return leaf
        return replace(leaf, values=jnp.swapaxes(leaf.values, -1, -2), inputs_last=True)

    swapped = jax.tree.map(inputs_last, params, is_leaf=lambda leaf: isinstance(leaf, Int8Weight))
    save_snapshot(tmp_path / "out", swapped, checkpoint.config_json, tokenizer_files={})
    again = load_params(open_checkpoint(tmp_path / "out"), dtype=jnp.float32)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_an_int8_snapshot_may_round_activations_too(source, int8_snapshot, monkeypatch):
    monkeypatch.setattr("fastgen_jax.engine.machine.multiplies_int8", lambda device: True)
    monkeypatch.setattr("pallas_kernels.native.available", lambda: False)  # matrices are stored as on an accelerator
    engines = [Engine.from_pretrained(path, quantize="w8a8", **ENGINE) for path in (source, int8_snapshot)]
    assert engines[1].config.quantize == "w8a8"
    logits = [Research(engine).put(["a"], [[5, 6, 7, 8]]) for engine in engines]
    np.testing.assert_array_equal(*logits)


def test_a_gguf_file_keeps_its_tokenizer_in_the_snapshot(tmp_path):
    fields = gguf_metadata("llama-bpe")
    write_gguf(
        tmp_path / "m.gguf",
        vocab_size=VOCAB,
        arrays=fields,
        metadata={"tokenizer.chat_template": "{{ messages[0].content }}"},
    )
    out = _snapshot(tmp_path / "m.gguf", tmp_path / "out")
    ours, theirs = (load_tokenizer(open_checkpoint(path).tokenizer_source) for path in (out, tmp_path / "m.gguf"))
    text = "The quick brown fox, 1234!"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.templates == theirs.templates
    assert (out / "tokenizer" / "tokenizer.gguf").stat().st_size < (tmp_path / "m.gguf").stat().st_size / 4


@pytest.mark.slow
def test_a_snapshot_does_not_depend_on_the_mesh_that_wrote_it(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.programs.meshes", str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert done.stdout.strip() == "same on every mesh", done.stderr[-3000:]


def test_orbax_itself_reads_a_snapshot(snapshot):
    import orbax.checkpoint as ocp

    checkpoint = open_checkpoint(snapshot)
    theirs = ocp.PyTreeCheckpointer().restore(snapshot / "params")
    assert theirs.keys() == checkpoint.tensor_names
    for name, array in theirs.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_a_snapshot_that_was_compressed_and_in_one_piece_loads_too(snapshot, tmp_path):
    """Snapshots of version 0.1.0 are like this, the demo checkpoint among them."""
    import orbax.checkpoint as ocp

    shutil.copytree(snapshot, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "params")
    checkpoint = open_checkpoint(snapshot)
    tree = {name: checkpoint.read(name) for name in checkpoint.tensor_names}
    ocp.PyTreeCheckpointer().save(tmp_path / "s" / "params", tree)
    again = open_checkpoint(tmp_path / "s")
    for name, array in tree.items():
        np.testing.assert_array_equal(again.read(name), array)


def test_opening_and_loading_a_snapshot_does_without_orbax(snapshot):
    """Importing it takes longer than reading half a gigabyte."""
    command = [sys.executable, "-m", "tests.checkpoint.programs.load_and_list_modules", str(snapshot)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    loaded = done.stdout.split()
    assert "tensorstore" in loaded
    assert "orbax.checkpoint" not in loaded


def _without_params(path):
    shutil.rmtree(path / "params")


def _cut_data(path):
    largest = max((path / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:100])


def _later_format(path):
    (path / "fastgen.json").write_text(json.dumps({"format": 99}))


def _bad_manifest(path):
    (path / "params" / "manifest.ocdbt").write_text("{")


def _without_manifest(path):
    (path / "params" / "manifest.ocdbt").unlink()


def _other_config(field, value):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {field: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_params, "has no params: its conversion was interrupted"),
        (_cut_data, "the weight '.*' cannot be read .*damaged, convert the original again"),
        (_later_format, "has format 99, but this version reads 1 and 2"),
        (_bad_manifest, "params is damaged"),
        (_without_manifest, r"params is damaged \(it holds no arrays\)"),
        (_other_config("num_hidden_layers", 3), r"has no tensor 'layers.attn_norm.2'"),
        (_other_config("num_hidden_layers", 1), r"holds 6 tensors that .*'layers.attn_norm.1'"),
        (
            _other_config("intermediate_size", 32),
            r"'layers.gate_up.0' has shape \(32, 128\), but the config requires \(32, 64\)",
        ),
    ],
)
def test_a_damaged_snapshot_is_refused_with_the_cause(snapshot, tmp_path, damage, message):
    shutil.copytree(snapshot, tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        load_params(open_checkpoint(tmp_path / "s"), dtype=jnp.float32, stack_layers=False)


def test_weights_that_cannot_be_saved_are_refused(source, snapshot, tmp_path):
    with pytest.raises(ValueError, match="is not empty; choose another directory"):
        _snapshot(source, snapshot)
    write_hf(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no tokenizer files; put tokenizer.json"):
        _snapshot(tmp_path / "bare", tmp_path / "out")
    checkpoint = open_checkpoint(source)
    with pytest.raises(ValueError, match="a str cannot be saved"):
        save_snapshot(tmp_path / "out", {"embed": "x", "layers": ()}, checkpoint.config_json, tokenizer_files={})


def test_a_snapshot_without_a_tokenizer_is_refused_where_one_is_needed(snapshot, tmp_path):
    shutil.copytree(snapshot, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer; convert the original again, or use token ids"):
        Engine.from_pretrained(tmp_path / "s")


def test_tokens_that_the_embedding_has_no_rows_for_are_refused_in_prompts_only(tmp_path, caplog):
    write_hf(tmp_path, vocab_size=96)
    write_json(tmp_path)
    engine = Engine.from_pretrained(tmp_path, token_budget=8, max_num_seqs=2, max_context_len=16)
    assert any("the tokenizer has 380 tokens but the embedding only 96 rows" in message for message in caplog.messages)
    assert engine.tokenizer is not None
    outside = next(id for id in range(96, 380) if engine.tokenizer.decode([id]).isalpha())
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    engine.add([5, 95], params)
    with pytest.raises(ValueError, match=r"outside the vocabulary, 0..95"):
        engine.add(engine.tokenizer.decode([outside]), params)
    outputs = [output for _ in range(5) for output in engine.step()]
    assert sum(len(output.new_token_ids) for output in outputs) == 3


class _Ranges(SimpleHTTPRequestHandler):
    """Serves parts of files, as buckets do."""

    sent = 0

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        data, status = file.read_bytes(), 200
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            size, status = len(data), 206
            data = data[int(first) : int(last) + 1 if last else size]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        type(self).sent += len(data)

    def log_message(self, *args):
        pass


def test_only_requested_arrays_are_read_over_a_network(snapshot):
    """A bucket is read by the same code; TensorStore knows its protocol."""
    local = open_checkpoint(snapshot)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=str(snapshot))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            arrays = open_arrays(f"http://127.0.0.1:{server.server_port}/params/")
            assert arrays.keys() == local.tensor_names
            before = _Ranges.sent
            got = read_array(arrays["layers.o.1"])
        finally:
            server.shutdown()
            thread.join()
    np.testing.assert_array_equal(got, local.read("layers.o.1"))
    assert _Ranges.sent - before < 2 * got.nbytes


def test_a_bucket_without_its_client_package_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://bucket/x: .* requires gcsfs, which is not installed; pip install gcsfs"):
        resolve_model("gs://bucket/x")


def test_bucket_urls_only_resolve_to_snapshots(snapshot, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="foo://bucket/x: this kind of URL is not supported"):
        resolve_model("foo://bucket/x")
    places = {"gs://bucket/full": snapshot, "gs://bucket/empty": tmp_path}
    monkeypatch.setattr("fastgen_jax.checkpoint.resolve.as_path", places.__getitem__)
    assert resolve_model("gs://bucket/full") == snapshot
    with pytest.raises(ValueError, match=r"is not a snapshot \(no fastgen.json\); copy the checkpoint to a local disk"):
        resolve_model("gs://bucket/empty")
