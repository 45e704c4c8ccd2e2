"""The public surface: names, types and reprs."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import pydoc
import tomllib
from pathlib import Path

import pytest

import fastgen_jax
import pallas_kernels
from fastgen_jax import AsyncEngine, Client, EngineConfig, Pipeline, Research, Response, SamplingParams, TokenLogprob
from fastgen_jax.api.deployment import Deployment
from fastgen_jax.flags import flag_arguments
from tests.checkpoint.tiny_files import write_hf
from tests.text.vocabularies import write_json
from tests.tiny import tiny_engine


def test_every_public_name_exists_and_matches_what_type_checkers_see():
    for name in fastgen_jax.__all__:
        value = getattr(fastgen_jax, name)
        assert name == "__version__" or value.__module__.startswith("fastgen_jax")
    assert sorted(fastgen_jax._HOMES) == sorted(set(fastgen_jax.__all__) - {"__version__"})
    assert dir(fastgen_jax) == sorted(fastgen_jax.__all__)
    imports = [
        node
        for node in ast.walk(ast.parse(Path(fastgen_jax.__file__).read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("fastgen_jax.")
        and node.module != "fastgen_jax.version"
    ]
    assert {alias.name: node.module for node in imports for alias in node.names} == fastgen_jax._HOMES


@pytest.mark.parametrize("package", [fastgen_jax, pallas_kernels])
def test_both_packages_are_marked_as_typed_and_wheels_include_the_marker(package):
    folder = Path(package.__path__[0])
    assert (folder / "py.typed").is_file()
    settings = tomllib.loads((folder.parent / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"][package.__name__]


def test_an_engine_and_its_pipeline_show_model_formats_devices_and_cache():
    engine = tiny_engine()
    text = repr(engine)
    assert text.startswith("Engine(llama, ")
    for part in ("K parameters, float32, on cpu; ", "KV cache of 256 tokens, float32, 64.0 KiB; ", "context 128; 0 running"):
        assert part in text
    pipe = Pipeline(engine)
    assert repr(pipe) == f"Pipeline({text.removeprefix('Engine(').removesuffix('; 0 running, 0 waiting)')})"


def test_an_engine_shows_its_name_and_its_defaults_apply_in_the_pipeline_and_in_the_engine(tmp_path):
    write_hf(tmp_path / "mine", vocab_size=512, num_hidden_layers=2)  # as in the tests of snapshots: compiled once
    write_json(tmp_path / "mine")
    (tmp_path / "mine" / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 3}')
    options = {"token_budget": 16, "budget_ladder": (16,), "max_num_seqs": 2, "block_size": 4, "num_blocks": 32}
    pipe = fastgen_jax.pipeline(tmp_path / "mine", progress=False, quantize="int8", **options)
    assert repr(pipe).startswith("Pipeline('mine', llama, ")
    assert "float32, int8 weights, on cpu" in repr(pipe)
    answers = [pipe("a tree", ignore_eos=True)[0] for _ in range(3)]
    assert {answer.token_ids for answer in answers} == {pipe("a tree", do_sample=False, ignore_eos=True)[0].token_ids}
    assert {answer.generated_length for answer in answers} == {3}
    pipe.destroy()
    assert repr(pipe) == "Pipeline(destroyed)"


def test_a_config_shows_what_differs_from_the_defaults():
    assert repr(EngineConfig()) == "EngineConfig()"
    config = EngineConfig(token_budget=32, generation_config={"temperature": 0.6})
    assert repr(config) == "EngineConfig(token_budget=32, generation_config=(('temperature', 0.6),))"
    assert eval(repr(config)) == config
    resolved = repr(tiny_engine().config)
    assert resolved.startswith("ResolvedConfig(dtype='float32', ")
    assert "num_blocks=64" in resolved


def test_a_response_shows_the_beginning_of_its_text_and_no_long_lists():
    entry = TokenLogprob(5, -1.0, 1, {5: -1.0})
    response = Response(
        generated_text="word " * 1000,
        prompt_length=7,
        generated_length=1000,
        finish_reason="stop",
        token_ids=tuple(range(1000)),
        logprobs=(entry,) * 1000,
    )
    assert repr(response).startswith("Response('word word")
    assert repr(response).endswith("'..., prompt_length=7, generated_length=1000, finish_reason='stop')")
    assert len(repr(response)) < 200
    assert str(response) == "word " * 1000


def test_sampling_parameters_show_what_differs_from_the_defaults():
    assert repr(SamplingParams()) == "SamplingParams()"
    params = SamplingParams(max_new_tokens=3, stop="x", logit_bias={5: 1})
    assert repr(params) == "SamplingParams(max_new_tokens=3, stop=('x',), logit_bias=((5, 1.0),))"
    assert eval(repr(params)) == params


def test_an_output_shows_its_text_and_tokens_and_how_the_request_ended():
    engine = tiny_engine()
    engine.add([1, 2, 3], SamplingParams(max_new_tokens=1, ignore_eos=True, do_sample=False), request_id="mine")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (token,) = outputs[-1].new_token_ids
    assert repr(outputs[-1]) == f"RequestOutput('mine', '', new_token_ids=({token},), finish_reason='length')"


def test_clients_and_the_research_interface_show_what_they_are_connected_to():
    there = Deployment(
        name="mine", model="org/m", url="http://127.0.0.1:8000", pid=os.getpid(), started=0, process_start="never"
    )
    client = Client(there)
    assert repr(client) == "Client('mine', org/m at http://127.0.0.1:8000, ended)"
    client.close()
    engine = tiny_engine()
    research = Research(engine)
    research.put(["a", "b"], [[1], [2]])
    assert repr(research) == f"Research({engine.describe()}; 2 sequences)"
    for uid in ("a", "b"):
        research.flush(uid)


def test_an_async_engine_shows_its_settings_and_its_load():
    async def shown() -> list[str]:
        async with AsyncEngine(tiny_engine(), max_queue=7) as engine:
            running = repr(engine)
        return [running, repr(engine)]

    running, closed = asyncio.run(shown())
    assert running.startswith("AsyncEngine(ResolvedConfig(dtype='float32'")
    assert running.endswith("; 0 unfinished requests, at most 7 waiting)")
    assert closed.endswith("; closed)")


PUBLIC_CLASSES = [name for name in fastgen_jax.__all__ if isinstance(getattr(fastgen_jax, name), type)]


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_help_of_a_class_has_a_first_sentence_and_every_public_method_too(name):
    cls = getattr(fastgen_jax, name)
    assert inspect.getdoc(cls), name
    for attribute, value in vars(cls).items():
        if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{attribute}"


def test_help_of_the_package_begins_with_an_example_and_lists_its_public_names_alone():
    text = pydoc.render_doc(fastgen_jax, renderer=pydoc.plaintext)
    heading, _, rest = text.partition("PACKAGE CONTENTS")
    assert 'pipe = fastgen_jax.pipeline("smollm2-135m-instruct")' in heading
    assert len(heading.splitlines()) < 40
    assert all(name in rest for name in fastgen_jax.__all__ if name != "__version__")
    assert "_EXPORTS" not in text
    assert "importlib" not in text


def test_defaults_of_generation_travel_to_a_server_that_is_started_by_name():
    (flag, value) = flag_arguments("generation_config", {"temperature": 0.6})
    assert flag == "--generation-config"
    assert EngineConfig(generation_config=value) == EngineConfig(generation_config={"temperature": 0.6})
