from __future__ import annotations

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.checkpoint.tensor_files import read_torch
from tests.checkpoint.tiny_files import write_hf

TORCH_FILE = Path(__file__).parents[1] / "reference" / "torch.bin"
DTYPES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
}


class _Global:
    """Something that is pickled as a reference to `module.name`."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.reference, self.arguments = f"{module}\n{name}", arguments


class _Pickler(pickle._Pickler):  # the one in Python, whose opcodes can be written by hand
    def save(self, obj, **options):
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + obj.reference.encode() + b"\n")
            if obj.arguments:
                self.save(obj.arguments[0])
                self.write(pickle.REDUCE)
            return
        super().save(obj, **options)

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, list) and obj[:1] == ["storage"] else None


def _tensor(key: int, array: np.ndarray, strides: tuple[int, ...] | None = None) -> _Global:
    storage = ["storage", _Global("torch", DTYPES[array.dtype]), str(key), "cpu", array.size]
    row_major = strides or tuple(stride // array.itemsize for stride in array.strides)
    return _Global(
        "torch._utils", "_rebuild_tensor_v2", (storage, 0, array.shape, row_major, False, collections.OrderedDict())
    )


def _view(key: int, array: np.ndarray, start: int) -> _Global:
    whole = _tensor(key, array)
    (storage, _, *rest) = whole.arguments[0]
    return _Global("torch._utils", "_rebuild_tensor_v2", (storage, start, *rest))


def write_torch(
    file: Path, arrays: dict[str, np.ndarray], *, extra: dict[str, object] | None = None, byte_order: str = "little"
) -> None:
    """A file as `torch.save(arrays)` writes it, so far as `read_torch` looks."""
    out = io.BytesIO()
    content = {name: _tensor(i, array) for i, (name, array) in enumerate(arrays.items())}
    _Pickler(out, protocol=2).dump(content | (extra or {}))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        archive.writestr("archive/byteorder", byte_order)
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())


def test_a_state_dict_that_pytorch_pickled_is_read_without_it():
    tensors = {name: tensor.map() for name, tensor in read_torch(TORCH_FILE).items()}
    assert {name: (array.dtype.name, array.shape) for name, array in tensors.items()} == {
        "float32": ("float32", (2, 3)),
        "float16": ("float16", (4,)),
        "bfloat16": ("bfloat16", (3, 2)),
        "parameter": ("float32", (2,)),
        "view": ("float32", (2, 3)),
        "scalar": ("float32", ()),
    }
    for name, array in tensors.items():
        first = 4 if name == "view" else 0
        np.testing.assert_array_equal(array.astype(np.float32).ravel(), np.arange(first, first + array.size))
    assert "torch" not in sys.modules


def test_a_directory_of_bin_files_loads_as_the_same_tensors_in_safetensors(tmp_path):
    write_hf(tmp_path / "st", dtype=ml_dtypes.bfloat16)
    made = write_hf(tmp_path / "bin", dtype=ml_dtypes.bfloat16)
    (tmp_path / "bin" / "model.safetensors").unlink()
    names = sorted(made)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        write_torch(tmp_path / "bin" / file, {name: made[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    one, other = (load_params(open_checkpoint(tmp_path / kind), dtype=jnp.float32) for kind in ("st", "bin"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"x": _Global("os", "system", ("true",))}, r"refers to os.system, which is not part of a dict of tensors"),
        ({"x": _Global("builtins", "eval", ("1",))}, r"refers to builtins.eval"),
        ({"epoch": 3}, r"its entry 'epoch' is not a tensor"),
        (
            {"t": _tensor(0, np.zeros((4, 4), np.float32), strides=(1, 4))},
            r"not stored row by row but with strides \(1, 4\)",
        ),
        ({"t": _tensor(0, np.zeros((4, 8), np.float32))}, r"fewer than its 32 numbers"),
        ({"t": _view(0, np.zeros((4, 4), np.float32), start=1)}, r"shape \(4, 4\) exceeds its storage of 16 numbers"),
    ],
)
def test_a_pickle_with_anything_but_plain_tensors_is_refused_and_not_run(tmp_path, extra, message):
    write_torch(tmp_path / "x.bin", {"w": np.zeros((4, 4), np.float32)}, extra=extra)
    with pytest.raises(ValueError, match=message):
        read_torch(tmp_path / "x.bin")


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path):
    write_torch(tmp_path / "x.bin", {"w": np.zeros((4, 4), np.float32)}, byte_order="big")
    with pytest.raises(ValueError, match="written on a big-endian machine"):
        read_torch(tmp_path / "x.bin")


def test_integers_in_a_bin_file_are_refused(tmp_path):
    made = write_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_torch(tmp_path / "pytorch_model.bin", made | {"model.norm.weight": np.zeros(32, np.int64)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has dtype int64; supported: float32"):
        open_checkpoint(tmp_path)


def test_a_truncated_or_old_bin_file_is_refused(tmp_path):
    data = TORCH_FILE.read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut.bin is truncated or not a PyTorch file"):
        read_torch(tmp_path / "cut.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(ValueError, match=r"format before PyTorch 1.6; load it with torch"):
        read_torch(tmp_path / "old.bin")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from Linux's /proc")
def test_loading_needs_memory_for_the_model_and_a_few_weights(tmp_path):
    config = {
        "num_hidden_layers": 24,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1024,
    }
    made = write_hf(tmp_path, shards=2, **config)
    model = sum(array.nbytes for array in made.values())
    largest = max(array.nbytes for array in made.values())
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.programs.peak_memory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Four weights in work, each once as read and once as prepared, and the allocator's own.
    assert int(done.stdout) < model + 8 * largest + 16e6, f"{int(done.stdout) / model:.2f} times the model"


def test_the_attributes_of_a_state_dict_are_ignored(tmp_path):
    """`torch.save(model.state_dict(), file)` stores an OrderedDict with the versions of its modules in `_metadata`."""
    state = collections.OrderedDict()
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(state, protocol=2))
    assert read_torch(tmp_path / "pytorch_model.bin") == {}
