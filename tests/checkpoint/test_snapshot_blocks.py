"""Snapshots of quantized models hold their blocks, and run as the original does."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen_jax import Engine, Research
from fastgen_jax.checkpoint import kept_in_blocks, load_params, open_checkpoint
from fastgen_jax.checkpoint.convert import convert
from fastgen_jax.checkpoint.snapshot_blocks import from_json, read_stored, stored_blocks
from fastgen_jax.cli import main
from fastgen_jax.engine.weights import kept_by_snapshot, snapshot_leaf
from fastgen_jax.models.params import all_specs
from fastgen_jax.plan.source import describe
from pallas_kernels import native
from pallas_kernels.grouped_matmul import BlockGroups
from pallas_kernels.matmul import Int4Weight, Int8Weight
from tests.checkpoint.quantized_files import write_int4
from tests.checkpoint.tiny_files import write_gguf
from tests.engine.test_blocks import PROMPT, TOKENIZER
from tests.models import parity
from tests.pallas_kernels.matmul.random_blocks import random_blocks
from tests.text.vocabularies import write_json
from tests.tiny import drain, greedy, tokens_of

SMALL: dict[str, Any] = {
    "token_budget": 16,
    "budget_ladder": (),
    "max_num_seqs": 4,
    "block_size": 4,
    "num_blocks": 32,
    "stack_layers": True,
}
FORMATS = [
    ("uint4", False, "float16"),
    ("uint4", True, "float16"),
    ("uint4", True, "float32"),
    ("int8", False, "float16"),
    ("int8", True, "float32"),
    ("float4_e2m1fn", False, "float8_e8m0fnu"),
    ("float8_e4m3fn", False, "float32"),
    ("nf4", False, "float32"),
]


def snapshot(source: Path, out: Path, *, quantize: str | None = None, dtype: str = "float32") -> Path:
    checkpoint = open_checkpoint(source)
    how = None if quantize == "none" else quantize
    prepare = partial(snapshot_leaf, dtype=dtype, quantize=how)
    convert(checkpoint, out, prepare=prepare, keep_blocks=kept_by_snapshot(checkpoint, quantize), quantize=how)
    return out


def gguf(path: Path, kind: Any, **overrides: Any) -> Path:
    write_gguf(path, kind=kind, arrays=TOKENIZER, hidden_size=64, intermediate_size=128, **overrides)
    return path


OTHERS = [pytest.param(each, marks=pytest.mark.slow) for each in ("Q4_0 and Q8_0", "awq")]


@pytest.fixture(scope="module", params=["Q4_1, tied", "gptq", *OTHERS])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    if request.param == "Q4_1, tied":
        return gguf(folder / "m.gguf", "Q4_1", tie_word_embeddings=True)
    if request.param == "Q4_0 and Q8_0":
        return gguf(folder / "m.gguf", lambda name: "Q8_0" if "down_proj" in name or "v_proj" in name else "Q4_0")
    return write_json(write_int4(folder / "m", request.param, symmetric=request.param == "gptq"))


@pytest.fixture(scope="module")
def kept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot(source, tmp_path_factory.mktemp("kept") / "out")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tests/engine/test_kept_forms.py."""
    monkeypatch.setattr("pallas_kernels.native.available", lambda: False)
    monkeypatch.setattr("fastgen_jax.engine.machine.int4_kernel", lambda device: "hopper")
    monkeypatch.setattr("fastgen_jax.engine.kept_forms.int4_fits", lambda kernel, shape, *, size, dtype: True)


def answers(path: Path, **options: Any) -> tuple[Engine, list[int], np.ndarray]:
    engine = Engine.from_pretrained(path, **SMALL | options)
    logits = Research(engine).put(["a"], [PROMPT])
    Research(engine).flush("a")
    request = engine.add(PROMPT, greedy(5))
    return engine, tokens_of(drain(engine)[request]), logits


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_blocks_are_stored_in_plain_arrays_and_read_back(form: tuple[str, bool, str]) -> None:
    weight = random_blocks(256, 24, 32, *form)
    stored = stored_blocks(weight)
    assert {str(array.dtype) for array in stored.arrays.values()} <= {"uint8", "int8", "float16", "float32"}
    assert stored.arrays["numbers"].size == 24 * 256 * weight.format.bits // 8
    formats = from_json(json.loads(json.dumps({"w": weight.format._asdict()})))
    back = read_stored(formats["w"], stored.arrays.__getitem__)
    assert back.format == weight.format
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())


def test_a_snapshot_has_the_kinds_and_the_values_of_the_original(source: Path, kept: Path) -> None:
    ours, theirs = open_checkpoint(kept), open_checkpoint(source)
    kinds = [
        {path: kind._replace(name="", is_common=False) for path, kind in kept_in_blocks(c).items()} for c in (ours, theirs)
    ]
    assert kinds[0] == kinds[1] != {}
    assert ours.config == theirs.config
    one, other = (load_params(checkpoint, dtype="float32", stack_layers=True) for checkpoint in (ours, theirs))
    for name, array in {**other["layers"], "embed": other["embed"]}.items():
        np.testing.assert_array_equal(one["embed"] if name == "embed" else one["layers"][name], array)
    stored = describe(str(kept)).stored
    assert {path: kind for path, kind in stored if path != "lm_head"} == {
        path: kind for path, kind in kept_in_blocks(ours).items() if path != "lm_head"
    }
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    plain = sum(np.asarray(array).nbytes for array in [*other["layers"].values(), other["embed"]])
    assert size < 0.75 * plain


@pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
def test_it_runs_as_the_original_on_a_cpu(source: Path, kept: Path) -> None:
    one, other = answers(source), answers(kept)
    assert "in the blocks of the file" in repr(other[0])
    assert one[1] == other[1]
    np.testing.assert_array_equal(one[2], other[2])


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("options", [{}, {"quantize": "none"}, {"tensor_parallel": 1}, {"quantize": "int4"}], ids=str)
def test_it_runs_as_the_original_on_an_accelerator(source: Path, kept: Path, options: dict[str, Any]) -> None:
    one, other = answers(source, **options), answers(kept, **options)
    assert isinstance(other[0].params["layers"]["o"], Int4Weight) == (options.get("quantize") != "none")
    assert one[1] == other[1]
    np.testing.assert_array_equal(one[2], other[2])


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("quantize", ["int4", "fp8"])
def test_a_model_that_was_quantized_by_the_conversion_runs_so(
    tmp_path: Path, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgen_jax.engine.machine.multiplies_float8", lambda device: True)
    source = gguf(tmp_path / "m.gguf", "F32")
    out = snapshot(source, tmp_path / "out", quantize=quantize)
    assert open_checkpoint(out).quantize == describe(str(out)).quantize == quantize
    one, other = answers(source, quantize=quantize), answers(out)
    assert other[0].config.quantize == quantize
    assert isinstance(other[0].params["lm_head"], Int8Weight) == (quantize == "int4")
    assert one[1] == other[1]
    np.testing.assert_array_equal(one[2], other[2])
    with pytest.raises(ValueError, match=f"quantize='int8', but the snapshot was made with --quantize {quantize}; omit"):
        Engine.from_pretrained(out, **SMALL, quantize="int8")


@pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
@pytest.mark.parametrize("quantize", ["int4", "fp8"])
def test_it_runs_on_a_cpu_too(tmp_path: Path, quantize: str) -> None:
    source = gguf(tmp_path / "m.gguf", "F32")
    out = snapshot(source, tmp_path / "out", quantize=quantize)
    engine, tokens, _ = answers(out)
    assert engine.config.quantize is None
    assert engine.params["layers"]["qkv"].panels.dtype == np.uint8
    assert len(tokens) == 5
    if quantize == "int4":
        assert tokens == answers(source, quantize="int4")[1]


def test_an_int8_snapshot_is_not_run_in_another_format(tmp_path: Path) -> None:
    out = snapshot(gguf(tmp_path / "m.gguf", "F32"), tmp_path / "out", quantize="int8")
    with pytest.raises(ValueError, match=r"quantize='none', but the snapshot .* choose 'int8' or 'w8a8', or convert"):
        Engine.from_pretrained(out, **SMALL, quantize="none")


def test_experts_are_stored_too(tmp_path: Path) -> None:
    source = parity.folder("gpt_oss", "mxfp4")
    checkpoint = open_checkpoint(source)
    shutil.copytree(source, tmp_path / "source")
    write_json(tmp_path / "source")
    out = snapshot(tmp_path / "source", tmp_path / "out")
    found: dict[str, list[np.ndarray]] = {}

    def prepare(spec: Any, array: Any) -> np.ndarray:
        if isinstance(array, BlockGroups):
            values = np.stack([array.read(number).dequantize() for number in range(array.shape[0])])
            found.setdefault(spec.path, []).append(values)
        return np.zeros(1, np.float32)

    load_params(open_checkpoint(out), dtype=None, prepare=prepare, keep_blocks=True, stack_layers=False)
    assert set(found) == {"layers.expert_gate_up", "layers.expert_down"}
    plain = load_params(checkpoint, dtype="float32", stack_layers=False)
    for path, arrays in found.items():
        assert arrays[0].shape == all_specs(checkpoint.config)[path].shape
        for array, layer in zip(arrays, plain["layers"], strict=True):
            np.testing.assert_array_equal(array, layer[path.removeprefix("layers.")])
    np.testing.assert_array_equal(open_checkpoint(out).read("layers.expert_down.1"), plain["layers"][1]["expert_down"])


def test_the_command_keeps_blocks_unless_it_is_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = gguf(tmp_path / "m.gguf", "Q4_1")
    for name, flags in {"kept": [], "plain": ["--quantize", "none"], "int8": ["--quantize", "int8"]}.items():
        assert main(["convert", str(source), str(tmp_path / name), *flags]) == 0
    formats = {name: json.loads((tmp_path / name / "fastgen.json").read_text()) for name in ("kept", "plain", "int8")}
    assert {name: found["format"] for name, found in formats.items()} == {"kept": 2, "plain": 1, "int8": 1}
    assert {found["numbers"] for found in formats["kept"]["blocks"].values()} == {"uint4"}
    assert (formats["plain"]["quantize"], formats["int8"]["quantize"]) == (None, "int8")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "kept")]) == 0
    assert "4 bits in groups of 32 with float16 scales and offsets" in capsys.readouterr().out


def _without(field: str) -> Any:
    def change(path: Path) -> None:
        marker = json.loads((path / "fastgen.json").read_text())
        del marker[field]
        (path / "fastgen.json").write_text(json.dumps(marker))

    return change


def _blocks(**fields: Any) -> Any:
    def change(path: Path) -> None:
        marker = json.loads((path / "fastgen.json").read_text())
        marker["blocks"]["layers.qkv"] |= fields
        (path / "fastgen.json").write_text(json.dumps(marker))

    return change


def _cut_data(path: Path) -> None:
    largest = max((path / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("blocks"), r"'layers\.\w+\.\d' has the arrays of blocks numbers, .*scales, but its format requires none"),
        (_blocks(size=64), r"has scales of shape \(128, 2\) for 64 inputs, but its format has blocks of 64; convert the"),
        (_blocks(numbers="int3"), r"fastgen.json: blocks has .*'int3'.* for 'layers.qkv', which this version does not know"),
        (_blocks(size=48), r"fastgen.json: blocks has size=48 for 'layers.qkv'; known: 16, 32"),
        (_blocks(has_offsets=False), r"has the arrays of blocks numbers, offsets, scales, but its format requires numbers"),
        (_cut_data, r"the weight '.*' cannot be read .*damaged, convert the original again"),
    ],
)
def test_a_damaged_snapshot_is_refused_with_the_cause(tmp_path: Path, damage: Any, message: str) -> None:
    out = snapshot(gguf(tmp_path / "m.gguf", "Q4_1"), tmp_path / "s")
    damage(out)
    with pytest.raises(ValueError, match=message):
        load_params(open_checkpoint(out), dtype="float32", stack_layers=False)


def test_a_matrix_without_whole_blocks_is_refused_with_the_remedy() -> None:
    specs = all_specs(open_checkpoint(parity.folder("gpt_oss", "mxfp4")).config)
    with pytest.raises(ValueError, match="blocks of a multiple of 16 inputs, but a weight has 24; use quantize='int8'"):
        snapshot_leaf(specs["layers.qkv"], np.ones((24, 8), np.float32), dtype="float32", quantize="fp8")
