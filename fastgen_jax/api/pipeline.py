"""Text generation in one call: prompts in, responses out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, overload

from fastgen_jax.api.options import Generation, LimitNotice, generation_of
from fastgen_jax.api.progress import Progress
from fastgen_jax.api.sharing import Outputs, SharedEngine, Stream
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.intake import TokenParts
from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob, VersionRuns
from fastgen_jax.engine.prompts import Prompt, split_prompts
from fastgen_jax.images import ImageSource
from fastgen_jax.scheduling import SamplingParams

Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]
SHOWN_CHARACTERS = 80  # of a text in the repr of a response


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Response:
    """The answer to one prompt. Lengths are in tokens."""

    generated_text: str
    """Empty when the engine has no tokenizer."""
    prompt_length: int
    generated_length: int
    finish_reason: str
    """"stop" (end of sequence, stop token or stop string) or "length"."""
    token_ids: tuple[int, ...]
    """Generated tokens; with `echo`, after those of the prompt."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per generated token, with `logprobs`."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry for each prompt token except the first, with `prompt_logprobs`."""
    cached_length: int = 0
    """Prompt tokens whose keys and values were in the prefix cache."""
    weight_versions: tuple[tuple[int, int], ...] = ()
    """Versions of the weights that generated the tokens, in order, each with how many; see `Engine.update_params`."""

    def __str__(self) -> str:
        return self.generated_text

    def __repr__(self) -> str:
        text = self.generated_text
        shown = repr(text) if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]!r}..."
        return (
            f"Response({shown}, prompt_length={self.prompt_length}, generated_length={self.generated_length}, "
            f"finish_reason={self.finish_reason!r})"
        )


class Pipeline:
    """A model with its tokenizer: `pipe(prompts, **options) -> [Response]`, `pipe.stream(prompt, **options)`.

    Generation options are the fields of `SamplingParams` (`max_new_tokens`, `temperature`, `stop`, `n`, ...), or a
    `SamplingParams` object as `params`, and `return_full_text`, `echo`, `stream` and `progress`. One of `regex`, `choice`,
    `json_schema` and `grammar` (Lark or GBNF) restricts the answers to the texts that follow it.

    Any number of threads may call and stream at the same time: the engine runs in a thread of the pipeline, and all
    requests share its steps. A KeyboardInterrupt, or another exception in a call or in the loop over a stream, ends the
    requests of that call and no others. `with pipeline(model) as pipe` destroys it at the end.
    """

    def __init__(self, engine: Engine) -> None:
        """Takes ownership of the engine: `destroy` destroys it."""
        self._shared = SharedEngine(engine)
        self._limits = LimitNotice()

    def __repr__(self) -> str:
        return f"Pipeline({'destroyed' if self._shared.is_destroyed else self.engine.describe()})"

    @property
    def engine(self) -> Engine:
        """The engine, which may be used directly during calls and streams; ValueError after `destroy`."""
        return self._shared.engine

    def __enter__(self) -> Self:
        _ = self.engine  # raises if it was destroyed
        return self

    def __exit__(self, *error: object) -> None:
        self.destroy()

    @overload
    def __call__(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        stream: Literal[False] = False,
        return_full_text: bool = False,
        echo: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Response]: ...

    @overload
    def __call__(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        stream: Literal[True],
        **options: Any,
    ) -> Outputs: ...

    def __call__(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        stream: bool = False,
        return_full_text: bool = False,
        echo: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Response] | Outputs:
        """One response per prompt, in order; with `n`, n consecutive responses per prompt.

        `prompts` is one prompt or several, each as text, token ids or chat messages. Sampling is controlled by `params`,
        or by `options`, with the model's defaults for omitted ones. `images` belong to a single prompt, or are a list with
        those of each prompt: images of Pillow, paths, bytes of files, data: URLs or arrays; see `Intake.parts`.
        `return_full_text` puts the prompt before the generated text, `echo` its ids before `token_ids`. `progress` shows a
        bar; None shows it on a terminal and in a notebook. With `stream`, returns an iterator of (index, `RequestOutput`) as
        tokens arrive instead. Raises ValueError, before anything runs, for an unknown or contradictory option, an image that
        cannot be read, or a prompt that cannot run. Raises RuntimeError if a step of one of the requests failed, and
        ValueError if the pipeline was destroyed in the meantime.
        """
        call = generation_of(self.engine.intake, params, options)
        if stream and (return_full_text or echo):
            raise ValueError("return_full_text and echo apply to complete responses; omit them with stream=True")
        items = split_prompts(prompts)
        parts = self._parts(items, images)
        if stream:
            return self._run(parts, call)
        token_ids = [part.token_ids for part in parts]
        n = call.params.n
        answers = [_Answer() for _ in range(len(items) * n)]
        limits = [call.most_tokens(len(ids)) for ids in token_ids for _ in range(n)]
        outputs = self._run(parts, call)
        try:
            with Progress(limits, show=progress) as bar:
                for index, output in outputs:
                    answers[index].add(output)
                    bar.add(index, output)
        finally:
            outputs.close()
        responses = []
        for index, answer in enumerate(answers):
            prompt_ids = token_ids[index // n]
            text = self._prompt_text(items[index // n], prompt_ids) if return_full_text else ""
            responses.append(answer.response(text, prompt_ids if echo else ()))
        return responses

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        **options: Any,
    ) -> Stream:
        """The outputs for one prompt, each as soon as its token is known; `output.text` is the new text.

        Leaving the loop early ends the request, and so does `close()` of the result. Raises as a call does.
        """
        call = generation_of(self.engine.intake, params, options)
        n = call.params.n
        if n != 1:
            raise ValueError(f"n is {n}; stream follows one sequence: use pipe(prompt, stream=True, n={n})")
        return Stream(self._run(self._parts([prompt], images), call))

    def destroy(self) -> None:
        """Frees weights and cache immediately; calls in progress and later uses raise ValueError.

        The memory is freed even if something still refers to it, such as a traceback kept by a notebook.
        """
        self._shared.destroy()

    def _parts(self, prompts: Sequence[Prompt], images: Images | None) -> list[TokenParts]:
        """The tokens and images of each prompt."""
        intake = self.engine.intake
        if images is None:
            return [intake.parts(prompt) for prompt in prompts]
        images = images if isinstance(images, list | tuple) else [images]
        lists = [isinstance(of_prompt, list | tuple) for of_prompt in images]
        if len(prompts) == 1 and not any(lists):
            return [intake.parts(prompts[0], images)]
        if not all(lists) or len(lists) != len(prompts):
            raise ValueError(
                f"images has {len(images)} entries for {len(prompts)} prompts; pass a list with a list of images "
                "for each prompt"
            )
        return [intake.parts(prompt, of_prompt) for prompt, of_prompt in zip(prompts, images, strict=True)]

    def _run(self, prompts: Sequence[TokenParts], call: Generation) -> Outputs:
        self.engine.check_adapter(call.params.adapter)
        intake = self.engine.intake
        grammar = call.grammar
        requests = [
            intake.request(part.token_ids, sample, awaits_each_token=grammar is not None, images=part.images)
            for part in prompts
            for sample in call.samples(len(part.token_ids))
        ]
        matchers = None if grammar is None else [intake.matcher(grammar) for _ in requests]
        return self._shared.run(requests, matchers, on_finished=partial(self._limits.note, call))

    def _prompt_text(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        if isinstance(prompt, str):
            return str.__str__(prompt)  # the text itself, also of a subclass
        tokenizer = self.engine.tokenizer
        return tokenizer.decode(list(token_ids), skip_special_tokens=False) if tokenizer else ""


class _Answer:
    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._versions = VersionRuns()
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self._last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> None:
        self._texts.append(output.text)
        self._token_ids += output.new_token_ids
        self._versions.add(output)
        self._logprobs += output.logprobs or ()
        self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        self._last = output

    def response(self, text_before: str, ids_before: Sequence[int]) -> Response:
        last = self._last
        assert last is not None
        assert last.finish_reason is not None
        return Response(
            generated_text=text_before + "".join(self._texts),
            prompt_length=last.num_prompt_tokens,
            generated_length=len(self._token_ids),
            finish_reason=last.finish_reason,
            token_ids=(*ids_before, *self._token_ids),
            logprobs=tuple(self._logprobs) if last.logprobs is not None else None,
            prompt_logprobs=self._prompt_logprobs,
            cached_length=last.num_cached_tokens,
            weight_versions=self._versions.runs,
        )


def pipeline(
    model: str | os.PathLike[str], *, progress: bool = True, config: EngineConfig | None = None, **options: Any
) -> Pipeline:
    """A pipeline for a model, ready to generate.

    `model` is a directory in Hugging Face layout, a GGUF file, "smollm2-135m-instruct", or a repo id on the hub.
    `options` are fields of `EngineConfig` (`token_budget`, `dtype`, `quantize`, `num_blocks`, ...), or pass them as
    `config`. Raises ValueError for an unknown option or a checkpoint that cannot be read.

        pipe = fastgen_jax.pipeline("smollm2-135m-instruct")
        print(pipe("DeepSpeed is", max_new_tokens=32)[0])
    """
    return Pipeline(Engine.from_pretrained(model, config, progress=progress, **options))
