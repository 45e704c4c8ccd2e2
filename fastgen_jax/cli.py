"""`fastgen`: generate, chat and measure from a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline

DEFAULT_MODEL = "smollm2-135m-instruct"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `fastgen` command and returns its exit code: 0 for success, 2 for a mistake in what was asked for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        from fastgen_jax.bench.__main__ import main as bench

        return bench(argv[1:])
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    try:
        return command(options)
    except ValueError as error:
        print(f"fastgen: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.scheduling import SamplingParams

    parser = argparse.ArgumentParser(prog="fastgen", description="High-throughput text generation with JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="answer prompts given as arguments or on standard input, one a line")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT")
    generate.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    generate.set_defaults(command=_generate)
    chat = commands.add_parser("chat", help="talk with a model; an empty line ends")
    chat.add_argument("--system", help="a first message that sets the tone")
    chat.set_defaults(command=_chat)
    demo = commands.add_parser("demo", help="a few prompts at once, with a summary of how the engine ran them")
    demo.set_defaults(command=_demo)
    commands.add_parser("bench", help="throughput and latency, ours and our peers' (fastgen bench --help)")
    for command in (generate, chat, demo):
        command.add_argument("--model", default=DEFAULT_MODEL,
                             help="directory, .gguf file, built-in name or repo id (default: %(default)s)")
        _add_fields(command.add_argument_group("engine"), EngineConfig)
        _add_fields(command.add_argument_group("generation"), SamplingParams, skip=("n", "logprobs", "prompt_logprobs",
                                                                                    "logit_bias"))
    return parser


def _add_fields(group: Any, cls: type, *, skip: Sequence[str] = ()) -> None:
    """One flag a dataclass field, None meaning that the field's default stands."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name in skip:
            continue
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
        if bool in kinds:
            group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=None)
        elif "tuple" in str(hint):
            kind = int if "int" in str(hint) else str
            group.add_argument(flag, dest=field.name, type=kind, nargs="+", default=None, metavar=kind.__name__.upper())
        else:
            kind = next((kind for kind in (int, float) if kind in kinds), str)
            kind = float if float in kinds else kind
            group.add_argument(flag, dest=field.name, type=kind, default=None, metavar=kind.__name__.upper())


def _pipeline(options: dict[str, Any]) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline that the options describe, and the generation options among them."""
    from fastgen_jax.api.pipeline import pipeline, sampling_params
    from fastgen_jax.engine.config import EngineConfig

    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
             for name, value in options.items() if value is not None}
    model = given.pop("model")
    engine = {f.name: given.pop(f.name) for f in fields(EngineConfig) if f.name in given}
    sampling_params(given)  # a mistake shows before the model is loaded
    return pipeline(model, **engine), given


def _generate(options: dict[str, Any]) -> int:
    prompts = options.pop("prompts") or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    chat = options.pop("chat")
    if not prompts:
        raise ValueError("no prompts; give them as arguments or on standard input, one a line")
    pipe, generation = _pipeline(options)
    items: list[Any] = [[{"role": "user", "content": text}] for text in prompts] if chat else prompts
    if len(items) == 1:
        for output in pipe.stream(items[0], **generation):
            print(output.text, end="", flush=True)
        print()
        return 0
    for prompt, response in zip(prompts, pipe(items, **generation), strict=True):
        print(f"> {prompt}\n{response.generated_text}\n")
    return 0


def _chat(options: dict[str, Any]) -> int:
    system = options.pop("system")
    pipe, generation = _pipeline(options)
    generation.setdefault("max_new_tokens", 512)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            text = input("you> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        answer = ""
        for output in pipe.stream(messages, **generation):
            answer += output.text
            print(output.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def _demo(options: dict[str, Any]) -> int:
    from fastgen_jax.demo import run

    pipe, generation = _pipeline(options)
    return run(pipe, generation)


if __name__ == "__main__":
    sys.exit(main())
