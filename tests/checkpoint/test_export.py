"""Weights that are exported as safetensors: the same files as the published ones, for every family, or nothing at all."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fastgen_jax.checkpoint import export_checkpoint, export_params, load_params, open_checkpoint, shards
from fastgen_jax.checkpoint.export import NOT_EXPORTED
from fastgen_jax.checkpoint.huggingface import RENAMED, text_name
from fastgen_jax.checkpoint.shards import Planned, write_directory
from fastgen_jax.cli import main
from fastgen_jax.models.families import baichuan
from fastgen_jax.text import load_tokenizer
from tests.checkpoint.tiny_files import write_gguf, write_hf
from tests.models.parity import folder, variants
from tests.text.vocabularies import write_json

PLAIN = [names for names in variants() if "quantization_config" not in (folder(*names) / "config.json").read_text()]
FIRST = dict(reversed(PLAIN))
DIFFERENT = ("gpt2", "deepseek_v3", "gpt_oss")  # conv1d, rearranged outputs, experts in one tensor


def _all(quick) -> list:
    slow = pytest.mark.slow
    return [pytest.param(*names, id="-".join(names), marks=() if quick(*names) else slow) for names in variants()]


VOCAB = 512  # rows of the embedding, enough for the tokenizer of tests.text


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of all safetensors files of a folder, by the library."""
    return {name: array for file in sorted(path.glob("*.safetensors")) for name, array in load_file(file).items()}


def published(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a text model that its export contains: not those of images, and no repetition of a tied embedding."""
    config, tensors = json.loads((path / "config.json").read_text()), tensors_of(path)
    if "text_config" in config or "vision_config" in config:
        tensors = {inner: array for name, array in tensors.items() if (inner := text_name(name)) is not None}
    tensors = {RENAMED.get(name, name): array for name, array in tensors.items()}
    if open_checkpoint(path).config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def assert_same_tensors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(("family", "variant"), _all(lambda family, variant: FIRST.get(family) == variant))
def test_a_checkpoint_is_exported_with_the_names_shapes_and_bytes_that_were_published(family, variant, tmp_path):
    checkpoint = open_checkpoint(folder(family, variant))
    if checkpoint.quantization:
        with pytest.raises(ValueError, match="is quantized"):
            export_checkpoint(tmp_path / "out", checkpoint)
        return
    if family in NOT_EXPORTED:
        with pytest.raises(ValueError, match=f"cannot be exported as a Hugging Face directory: {NOT_EXPORTED[family]}"):
            export_checkpoint(tmp_path / "out", checkpoint)
        return
    export_checkpoint(tmp_path / "out", checkpoint)
    assert_same_tensors(tensors_of(tmp_path / "out"), published(folder(family, variant)))
    again = open_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config
    assert again.config.family == checkpoint.config.family


@pytest.mark.parametrize(
    ("family", "variant"), _all(lambda family, variant: FIRST.get(family) == variant and family in DIFFERENT)
)
def test_params_in_bfloat16_are_exported_bit_by_bit(family, variant, tmp_path):
    checkpoint = open_checkpoint(folder(family, variant))
    if checkpoint.quantization or family in NOT_EXPORTED:
        pytest.skip("its tensors are not the weights, or it is not exported")
    stack_layers = len(variant) % 2 == 0  # both forms occur
    params = load_params(checkpoint, dtype="bfloat16", stack_layers=stack_layers)
    export_params(tmp_path / "out", params, checkpoint)
    want = {name: array.astype(ml_dtypes.bfloat16) for name, array in published(folder(family, variant)).items()}
    assert_same_tensors(tensors_of(tmp_path / "out"), want)


def test_the_command_carries_tokenizer_and_settings_along(tmp_path, capsys):
    write_hf(tmp_path / "m", vocab_size=VOCAB, num_hidden_layers=2, eos_token_id=2)
    write_json(tmp_path / "m")
    generation = {"temperature": 0.6, "eos_token_id": [2, 3]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(generation))
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "out"), "--format", "safetensors"]) == 0
    assert "wrote" in capsys.readouterr().out
    ours, theirs = (load_tokenizer(tmp_path / name) for name in ("out", "m"))
    assert ours.encode("The quick brown fox") == theirs.encode("The quick brown fox")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((tmp_path / "m" / "config.json").read_text()) | {
        "eos_token_id": [2, 3],
        "model_type": "llama",
        "torch_dtype": "float32",
    }
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "m"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_models_are_divided_into_files_with_an_index(tmp_path):
    tensors = write_hf(tmp_path / "m")
    export_checkpoint(tmp_path / "out", open_checkpoint(tmp_path / "m"), shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert {
        name: load_file(tmp_path / "out" / file).keys() for name, file in index["weight_map"].items()
    }.keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert all((tmp_path / "out" / file).stat().st_size < 25_000 for file in files)
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors)


def test_a_gguf_file_becomes_the_same_tensors(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    tensors = write_hf(tmp_path / "m")
    export_checkpoint(tmp_path / "m.gguf.out", open_checkpoint(tmp_path / "m.gguf"))
    assert_same_tensors(tensors_of(tmp_path / "m.gguf.out"), tensors)
    assert json.loads((tmp_path / "m.gguf.out" / "config.json").read_text())["model_type"] == "llama"


def test_values_of_quantized_weights_are_written_only_on_request(tmp_path):
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"embed_tokens.weight' is quantized \(Q8_0\).*--dtype bfloat16"):
        export_checkpoint(tmp_path / "out", checkpoint)
    assert not (tmp_path / "out").exists()
    export_checkpoint(tmp_path / "out", checkpoint, dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(tensors_of(tmp_path / "out")[name], checkpoint.read(name))


@pytest.mark.slow
def test_an_int8_snapshot_is_written_only_on_request(tmp_path):
    write_hf(tmp_path / "m", vocab_size=VOCAB)
    write_json(tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "float32"), "--dtype", "float32"]) == 0
    export_checkpoint(tmp_path / "float32.out", open_checkpoint(tmp_path / "float32"))
    assert_same_tensors(tensors_of(tmp_path / "float32.out"), tensors_of(tmp_path / "m"))
    out = tmp_path / "snapshot"
    assert main(["convert", str(tmp_path / "m"), str(out), "--dtype", "float32", "--quantize", "int8"]) == 0
    with pytest.raises(ValueError, match="is quantized"):
        export_checkpoint(tmp_path / "out", open_checkpoint(out))
    export_checkpoint(tmp_path / "out", open_checkpoint(out), dtype="float32")
    got, want = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "m")
    assert got.keys() == want.keys()
    assert max(np.abs(got[name] - want[name]).max() for name in want) < 0.03


def test_float32_weights_are_converted_except_those_that_must_not_be(tmp_path):
    checkpoint = open_checkpoint(folder("deepseek_v3", FIRST["deepseek_v3"]))
    export_params(tmp_path / "out", load_params(checkpoint, dtype="float32"), checkpoint, dtype="bfloat16")
    kinds = {name: str(array.dtype) for name, array in tensors_of(tmp_path / "out").items()}
    wide = {name for name, kind in kinds.items() if kind == "float32"}
    assert wide
    assert all(name.endswith("e_score_correction_bias") for name in wide)
    assert {kinds[name] for name in kinds.keys() - wide} == {"bfloat16"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_hf(path, vocab_size=VOCAB)
    return write_json(path)


def _stacked(tiny: Path) -> dict:
    return load_params(open_checkpoint(tiny), dtype="float32")


def test_params_that_are_no_plain_weights_are_refused_and_nothing_is_written(tiny, tmp_path, capsys):
    from pallas_kernels.matmul import Int8Weight

    checkpoint, params = open_checkpoint(tiny), _stacked(tiny)
    layers = params["layers"]
    quantized = Int8Weight(values=layers["o"].astype(jnp.int8), scales=jnp.ones((3, 32), jnp.float32))
    changes = {
        "'layers.o' is Int8Weight, which is quantized": {"layers": layers | {"o": quantized}},
        "'layers.o' is int8, which is quantized": {"layers": layers | {"o": layers["o"].astype(jnp.int8)}},
        r"'layers.o' has shape \(2, 64, 32\); its config requires \(3, 64, 32\)": {
            "layers": layers | {"o": layers["o"][1:]}
        },
        "lacks the weight 'o' of layer 0": {"layers": {name: leaf for name, leaf in layers.items() if name != "o"}},
        r"'embed' has shape \(32, 512\)": {"embed": params["embed"].T},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            export_params(tmp_path / "out", params | change, checkpoint)
    with pytest.raises(ValueError, match="dtype is 'int8'; choose one of float32"):
        export_params(tmp_path / "out", params, checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="local disk"):
        export_params("gs://bucket/out", params, checkpoint)
    assert main(["convert", str(tiny), str(tmp_path / "out"), "--format", "safetensors", "--quantize", "int8"]) == 2
    assert "--quantize is for snapshots" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_contents_is_refused_and_an_empty_one_is_used(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another directory"):
        export_params(tmp_path, _stacked(tiny), open_checkpoint(tiny))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="choose a directory outside it"):
        export_checkpoint(tiny / "inside", open_checkpoint(tiny))
    (tmp_path / "empty").mkdir()
    export_params(tmp_path / "empty", _stacked(tiny), json.loads((tiny / "config.json").read_text()))
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), pytest.raises(ValueError, match=r"full: the model needs 0.0 GB")),
        (OSError(errno.EIO, "Input/output error"), pytest.raises(OSError, match="Input/output")),
        (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
    ],
    ids=["disk full", "disk broken", "interrupt"],
)
@pytest.mark.parametrize("exists", [True, False])
def test_an_export_that_fails_half_way_leaves_nothing(failure, expected, exists, tmp_path):
    plan = [Planned(name, "float32", (4,)) for name in "abc"]
    seen = []

    def arrays():
        yield np.zeros(4, np.float32)
        yield np.zeros(4, np.float32)
        seen.extend(path.name for path in (tmp_path / "out").iterdir())
        raise failure

    if exists:
        (tmp_path / "out").mkdir()
    with expected:
        write_directory(tmp_path / "out", plan, arrays(), texts={"config.json": {}}, files={}, shard_bytes=16)
    assert seen
    assert all(name.endswith(".incomplete") for name in seen)
    assert (tmp_path / "out").exists() == exists
    assert not exists or not any((tmp_path / "out").iterdir())


def test_too_small_a_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    plan = [Planned("a", "bfloat16", (1000, 1000))]
    with pytest.raises(ValueError, match=r"needs 0.0 GB, but its disk has 0.0 GB left"):
        write_directory(tmp_path / "out", plan, iter(()), texts={}, files={})
    assert not (tmp_path / "out").exists()


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def arrays():
        nonlocal most
        for _ in range(6):
            array = np.zeros((64, 64), np.float32)
            alive.append(weakref.ref(array))
            most = max(most, sum(one() is not None for one in alive))
            yield array
            del array

    plan = [Planned(str(i), "float32", (64, 64)) for i in range(6)]
    write_directory(tmp_path / "out", plan, arrays(), texts={"config.json": {}}, files={}, shard_bytes=40_000)
    assert most == 1


def test_tensors_of_all_dtypes_are_aligned(tmp_path):
    arrays = {"a": np.ones(3, ml_dtypes.bfloat16), "b": np.ones(2, np.float32), "c": np.ones((1, 5), np.float16)}
    plan = [Planned(name, str(array.dtype), array.shape) for name, array in arrays.items()]
    write_directory(tmp_path / "out", plan, iter(arrays.values()), texts={"config.json": {}}, files={})
    assert_same_tensors(tensors_of(tmp_path / "out"), arrays)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, array in arrays.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_the_head_of_baichuan_2_is_exported_as_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(baichuan, "VOCAB_SIZE_2", open_checkpoint(folder("baichuan", "7b")).config.vocab_size)
    checkpoint = open_checkpoint(folder("baichuan", "7b"))
    params = load_params(checkpoint, dtype="float32")
    export_params(tmp_path / "out", params, checkpoint)
    again = load_params(open_checkpoint(tmp_path / "out"), dtype="float32")
    np.testing.assert_allclose(again["lm_head"], params["lm_head"], rtol=1e-6)


def test_layers_for_multi_token_prediction_are_neither_written_nor_announced(tmp_path):
    shutil.copytree(folder("deepseek_v3", FIRST["deepseek_v3"]), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    export_checkpoint(tmp_path / "out", open_checkpoint(tmp_path / "m"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_rows_of_sharded_arrays_are_gathered_one_by_one(tiny, tmp_path):
    mesh = jax.make_mesh((1,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    export_params(tmp_path / "out", jax.device_put(_stacked(tiny), place), open_checkpoint(tiny))
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tiny))
