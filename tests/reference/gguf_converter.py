"""Runs llama.cpp's converter with patches for unknown tokenizers and for fields that transformers 5 renames.

Accepts the converter's arguments. Run by make_gguf.py, with llama.cpp and its gguf-py on the path. The patches: the
converter identifies byte-level vocabularies by a hash of their output for a text, which our files do not need; it reads
config.json through transformers, whose version 5 drops the old names of some fields; it returns the stacked norms of
StableLM's heads although it should yield them; and it converts Baichuan's other tensors with the function for the fused
ones, without end.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion.baichuan import BaichuanModel
from conversion.base import ModelBase, TextModel
from conversion.exaone import Exaone4Model
from conversion.gemma import Gemma4Model
from conversion.glm import Glm4Model
from conversion.hunyuan import HunYuanModel
from conversion.internlm import InternLM2Model
from conversion.llama import LlamaModel
from conversion.nemotron import NemotronHModel, NemotronModel
from conversion.phi import Phi3MiniModel
from conversion.stablelm import StableLMModel

load = ModelBase.load_hparams
modify = StableLMModel.modify_tensors
of_baichuan = BaichuanModel.modify_tensors


def load_all(path: Path, *_: Any, **__: Any) -> dict[str, Any]:
    fields = load(path, False) | json.loads((path / "config.json").read_text())
    # Fields of experts, which the published configs of Nemotron-H without experts do not have.
    of_experts = ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")
    absent = [name for name in of_experts if fields.get(name, 0) is None]
    return {name: value for name, value in fields.items() if name not in absent}


def modify_all(*arguments: Any) -> Iterator[Any]:
    yield from (yield from modify(*arguments)) or ()


def modify_baichuan(self: Any, data: Any, name: str, layer: int | None) -> Iterator[Any]:
    fused = name.endswith("W_pack.weight")
    yield from of_baichuan(self, data, name, layer) if fused else TextModel.modify_tensors(self, data, name, layer)


def none(self: Any) -> None:
    pass


ModelBase.load_hparams = staticmethod(load_all)
StableLMModel.modify_tensors = modify_all
BaichuanModel.modify_tensors = modify_baichuan
TextModel.set_vocab = TextModel._set_vocab_gpt2 = TextModel._set_vocab_qwen = none
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_glm = none
for model in (Glm4Model, Exaone4Model, Gemma4Model, HunYuanModel, InternLM2Model, LlamaModel, NemotronModel, Phi3MiniModel):
    model.set_vocab = none
NemotronHModel.set_vocab = none
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
