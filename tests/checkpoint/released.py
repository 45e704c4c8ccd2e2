"""Released checkpoints as published: what of each this package reads, and how that was seen.

    python -m tests.checkpoint.released                # rewrites the table of docs/models.md; `make models-table`
    python -m tests.checkpoint.released --files FOLDER [--theirs FILE]

Data, in `tests/reference/released`: `checkpoints.jsonl` has each config.json as published, with its source; `logits.npz`
what transformers computes for it, scaled down (`make_released_logits.py`); `measured.json` what a run found. A run without
options measures the logits again. `--files` measures what needs files that are too large to keep or are not ours to copy:
FOLDER has a folder ORG--NAME for each checkpoint, with any of its index file, tokenizer files and chat template, and SOURCE,
a text that says where they are from. `--theirs` is what `encode_released.py` made of the same folder with transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.checkpoint.base import is_buffer
from fastgen_jax.checkpoint.huggingface import decoder_tensors, model_config
from fastgen_jax.checkpoint.load import required_tensors
from fastgen_jax.checkpoint.quantized import quantization_method, split_settings
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.families import FAMILIES, fields
from fastgen_jax.models.families.common import Source
from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.chat import ChatTemplate, render_chat
from tests.models.parity import DOCUMENT, REFERENCE, Runs, error, replace_between
from tests.reference.conversations import CONVERSATIONS
from tests.reference.shrunk import PROMPT_LENGTH, ROWS, prompt, random_tensor, shrunk

RELEASED = REFERENCE / "released"
MEASURED = RELEASED / "measured.json"
# Tensors that a quantized matrix has beside its values, and endings of the values themselves.
_BESIDE = ("_scales", "_scale_inv", ".scales", ".biases", ".weight_scale", ".weight_scale_2", ".input_scale")
_VALUES = ("_blocks",)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One line of `checkpoints.jsonl`."""

    model: str
    source: str
    config: JsonObject

    @property
    def folder(self) -> str:
        """Its name in a folder of published files."""
        return self.model.replace("/", "--").replace(", ", "--").replace(" ", "-")


@dataclass(frozen=True, kw_only=True)
class _Declared:
    """A checkpoint of which only the config is there, for `required_tensors`."""

    config: ModelConfig
    tensor_names: frozenset[str]

    @property
    def sources(self) -> Mapping[str, Source]:
        return FAMILIES[self.config.family].sources(self.config)


@cache
def releases() -> tuple[Release, ...]:
    """All released checkpoints of the table."""
    lines = (RELEASED / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Release(**json.loads(line)) for line in lines)


def measured() -> dict[str, JsonObject]:
    """What a run found, by model."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}


def read(release: Release) -> tuple[ModelConfig, list[str]]:
    """The `ModelConfig` of a release and the warnings that reading it gives; ValueError if it is refused."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    fields._warn.cache_clear()
    fields._warn_of_no_effect.cache_clear()
    fields.log.addHandler(handler)
    try:
        settings, rest = split_settings(release.config)
        if settings:
            quantization_method(settings)
        return model_config(rest, release.model), said
    finally:
        fields.log.removeHandler(handler)


def required(config: ModelConfig, *, prefix: bool = True) -> dict[str, tuple[int, ...]]:
    """The tensors that a config requires; some releases leave out the `prefix` of the model ("transformer.")."""
    model = FAMILIES[config.family].sources(config)["embed"].names[0]
    return required_tensors(_Declared(config=config, tensor_names=frozenset({model} if prefix else ())))  # type: ignore[arg-type]


def digest(names: Mapping[str, Any]) -> str:
    """A number for a set of tensor names."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def match_names(release: Release, index: JsonObject) -> JsonObject:
    """The comparison of the names in an index file with those that the config requires."""
    config, _ = read(release)
    _, rest = split_settings(release.config)
    names = decoder_tensors(dict.fromkeys(index["weight_map"]), rest, config)
    plain = {_without_ending(name) for name in names if not (is_buffer(name) or name.endswith(_BESIDE))}
    wanted = min((required(config, prefix=prefix) for prefix in (True, False)), key=lambda them: len(them.keys() ^ plain))
    beside = {"lm_head.weight"} if config.tie_embeddings else set()  # compared with the embedding when it is loaded
    return {
        "count": len(plain),
        "missing": sorted(wanted.keys() - plain),
        "unexpected": sorted(plain - wanted.keys() - beside),
        "digest": digest(dict.fromkeys(plain - beside)),
        "bytes": int(index.get("metadata", {}).get("total_size") or 0),
        "whole": plain == wanted.keys() and len(names) == len(index["weight_map"]) and len(names) == len(plain),
    }


def _without_ending(name: str) -> str:
    for ending in _VALUES:
        name = name.removesuffix(ending)
    return name


def measure_values(release: Release, theirs: np.ndarray) -> float:
    """The largest difference between our logits and theirs for the config scaled down, in units of the largest."""
    small = shrunk(release.config)
    config = model_config(small, release.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(small))
        save_file({name: random_tensor(name, shape) for name, shape in required(config).items()}, path / "model.safetensors")
        params = load_params(open_checkpoint(path), dtype="float32", stack_layers=False)
    runs = Runs(params, config, PROMPT_LENGTH)
    return error(runs.logits(prompt(), [PROMPT_LENGTH], prompt_length=PROMPT_LENGTH)[list(ROWS)], theirs)


def measure_texts(folder: Path, theirs: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    """How many ids of texts and how many rendered conversations are equal to those of transformers."""
    tokenizer = load_tokenizer(folder) if theirs["ids"] else None
    if tokenizer is not None:
        ours = [list(tokenizer.encode(text)) for text in theirs["texts"]]
        equal = sum(a == b for a, b in zip(ours, theirs["ids"], strict=True))
        result: JsonObject = {"texts": len(ours), "equal": equal}
        if (folder / "tokenizer.json").exists():
            as_filed = Tokenizer.from_file(str(folder / "tokenizer.json"))
            result["as_filed"] = sum(
                as_filed.encode(text).ids == ids for text, ids in zip(theirs["texts"], ours, strict=True)
            )
        yield "tokenizer", result
    if theirs["rendered"] is not None:
        differing = [name for name, text in theirs["rendered"].items() if _rendered(folder, theirs, name) != text]
        refused = [name for name, text in theirs["rendered"].items() if text is None]
        yield (
            "template",
            {
                "conversations": len(theirs["rendered"]),
                "differing": [name for name in differing if name not in refused],
                "refused": len(refused),
                "digest": theirs["digest"],
            },
        )


def _rendered(folder: Path, theirs: JsonObject, name: str) -> str | None:
    given = CONVERSATIONS[name]
    template = ChatTemplate(name=folder.name, text=theirs["template"])
    try:
        return render_chat(
            template,
            given["messages"],
            add_generation_prompt=True,
            tools=given.get("tools"),
            named_tokens=theirs["named_tokens"],
            extra=given.get("extra", {}),
        )
    except ValueError:
        return None


def measure_files(folder: Path, theirs: Mapping[str, JsonObject]) -> None:
    """Records what the files of `folder` show."""
    found = measured()
    for release in releases():
        path = folder / release.folder
        if not path.exists():
            continue
        source = (path / "SOURCE").read_text(encoding="utf-8").strip()
        entry = found.setdefault(release.model, {})
        for index in sorted(path.glob("*.index.json")):
            entry["names"] = {"source": source, **match_names(release, json.loads(index.read_bytes()))}
        if release.folder in theirs:
            texts = theirs[release.folder]
            for kind, result in measure_texts(path, texts):
                entry[kind] = {"source": source, "transformers": texts["transformers"], **result}
        print(release.model, {kind: entry.get(kind) for kind in ("names", "tokenizer", "template")}, flush=True)
    _write(found)


def _write(found: Mapping[str, JsonObject]) -> None:
    lines = [f"{json.dumps(model)}: {json.dumps(found[model], ensure_ascii=False)}" for model in sorted(found)]
    MEASURED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table() -> list[str]:
    """The lines of the tables of docs/models.md: what loads, then what is refused."""
    columns = ("checkpoint", "architecture", "parameters", "config", "tensor names", "tokenizer", "template", "values")
    rows, refused, found = [], [], measured()
    for release in releases():
        (architecture,) = release.config["architectures"]
        try:
            config, said = read(release)
        except ValueError as problem:
            refused.append(f"| {release.model} | {architecture} | {_reason(str(problem))} |")
            continue
        entry, parameters = found.get(release.model, {}), count_params(config)
        cells = (
            release.model,
            architecture,
            _count(parameters),
            _config_cell(release, said),
            _names_cell(entry.get("names"), parameters),
            _texts_cell(entry.get("tokenizer"), "texts"),
            _texts_cell(entry.get("template"), "conversations"),
            f"{entry['values']:.0e}" if "values" in entry else "none in transformers",
        )
        rows.append(f"| {' | '.join(cells)} |")
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*head, *rows, "", "| refused | architecture | because |", "|---|---|---|", *refused]


def _reason(message: str) -> str:
    message = message.split(": ", 1)[1].split("; ")[0]
    return "architecture not supported" if message.startswith("architecture ") else message


def _count(parameters: int) -> str:
    unit, size = next((unit, size) for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if parameters >= size)
    return f"{parameters / size:.3g} {unit}"


def _config_cell(release: Release, said: list[str]) -> str:
    settings, _ = split_settings(release.config)
    cell = f"read; {quantization_method(settings)}" if settings else "read"
    unknown = [text.split("ignored: ")[1].split(";")[0] for text in said if "ignored: " in text]
    return cell + "".join(f"; warns of {names}" for names in unknown)


def _names_cell(names: JsonObject | None, parameters: int) -> str:
    if names is None:
        return "no file found"
    if names["missing"] or names["unexpected"]:
        return f"{len(names['missing'])} missing, {len(names['unexpected'])} unexpected of {names['count']}"
    cell = f"{names['count']} of {names['count']}"
    if names["whole"] and names["bytes"]:
        cell += f"; {names['bytes'] / parameters:.3g} bytes a parameter"
    return cell


def _texts_cell(found: JsonObject | None, unit: str) -> str:
    if found is None:
        return "no file found"
    if unit == "texts":
        differs = found["equal"] < found["texts"] and "as_filed" in found
        return f"{found['equal']} of {found['texts']}" + (f" ({found['as_filed']} as in the file)" if differs else "")
    count, adapted = found["conversations"] - found["refused"], found["differing"]
    return f"{count - len(adapted)} of {count}" + (f" (adapted: {', '.join(adapted)})" if adapted else "")


def main() -> None:
    """Measures what the options say, and rewrites the table."""
    parser = argparse.ArgumentParser(description="Rewrites the table of released checkpoints.")
    parser.add_argument("--files", type=Path, help="folder of published files")
    parser.add_argument("--theirs", type=Path, help="what encode_released.py made of that folder")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.files:
        measure_files(options.files, json.loads(options.theirs.read_text(encoding="utf-8")) if options.theirs else {})
    elif not options.only_table:
        found, logits = measured(), np.load(RELEASED / "logits.npz")
        for release in releases():
            try:
                read(release)
            except ValueError:
                continue
            if release.model in logits:
                found.setdefault(release.model, {})["values"] = float(
                    f"{measure_values(release, logits[release.model]):.1e}"
                )
                print(release.model, found[release.model]["values"], flush=True)
        _write(found)
    DOCUMENT.write_text(replace_between(DOCUMENT.read_text(), "released", table()))


if __name__ == "__main__":
    main()
