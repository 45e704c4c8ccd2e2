"""Defaults for options that a request omits: the model's own, from its generation_config.json.

The names are those of the Hugging Face file, which `SamplingParams` shares. The options that vLLM supports, and
`do_sample`, are supported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastgen_jax.engine.option_names import nearest
from fastgen_jax.json_types import JsonFields
from fastgen_jax.scheduling import SamplingParams

log = logging.getLogger(__name__)

DEFAULTS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_NEUTRAL = {"temperature": (1,), "top_k": (0, -1), "top_p": (1,), "min_p": (0,), "repetition_penalty": (1,)}
_FILTERS = ("temperature", "top_k", "top_p", "min_p")  # without effect when the most likely token is taken

# Unsupported options that would change the text -> their neutral values.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "mirostat": (0,),
    "xtc_probability": (0,),
}

Pairs = tuple[tuple[str, Any], ...]


def defaults_of_model(raw: JsonFields, where: object) -> Pairs:
    """The defaults that a generation_config.json, or its equivalent in another format, sets for requests.

    Unsupported options that would change the text are logged. Raises ValueError naming `where` for a value out of range.
    """
    ignored = {
        name: raw[name] for name, neutral in _UNSUPPORTED.items() if raw.get(name) is not None and raw[name] not in neutral
    }
    if ignored:
        log.warning(
            "%s has options that are not supported and are ignored: %s",
            where,
            ", ".join(f"{name}={value!r}"[:80] for name, value in ignored.items()),
        )
    try:
        return checked_defaults({name: raw[name] for name in DEFAULTS if name in raw})
    except ValueError as error:
        raise ValueError(
            f"the sampling defaults of {where} cannot be used: {error}; correct them, or start with generation_config='none'"
        ) from error


def checked_defaults(defaults: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Pairs:
    """Names and values of the defaults that have an effect; ValueError for an unknown name or a value out of range.

    `do_sample=False` becomes a temperature of 0, which a request can override with another temperature.
    """
    values = {name: value for name, value in dict(defaults).items() if value is not None}
    for name in values:
        if name not in DEFAULTS:
            raise ValueError(
                f"generation_config has {name!r}, but defaults can be set for {', '.join(DEFAULTS)}{nearest(name, DEFAULTS)}"
            )
    if values.get("do_sample") is False or values.get("temperature") == 0:
        values = {
            **{name: value for name, value in values.items() if name not in _FILTERS},
            "temperature": 0.0,
            "do_sample": True,
        }
    SamplingParams(**values)
    return tuple(
        (name, value) for name, value in values.items() if name != "do_sample" and value not in _NEUTRAL.get(name, ())
    )


def parse_setting(setting: object) -> str | Pairs:
    """`EngineConfig.generation_config` in one of its forms: "auto", "none", or checked pairs; ValueError otherwise."""
    if isinstance(setting, str) and setting.lstrip().startswith("{"):
        try:
            setting = json.loads(setting)
        except ValueError as error:
            raise ValueError(f"generation_config is {setting!r}, which is not JSON ({error})") from None
    if isinstance(setting, str) and setting in ("auto", "none"):
        return setting
    if isinstance(setting, Mapping | tuple | list):
        return checked_defaults(setting)
    raise ValueError(
        f"generation_config is {setting!r}; choose 'auto' (the model's own defaults), 'none', or pass defaults "
        "such as {'temperature': 0.6}"
    )


def sampling_params(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from the options of a request and, for omitted ones, from the model's defaults.

    An option that is None counts as omitted. A default that contradicts an option is dropped. The default of
    `max_new_tokens` is not applied here: see `limited`. Raises ValueError as `SamplingParams` does.
    """
    given = {name: value for name, value in options.items() if value is not None}
    rest = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
    if given.get("do_sample") is False or given.get("temperature") == 0:
        rest = {name: value for name, value in rest.items() if name not in _FILTERS}
    if given.get("do_sample") is True and rest.get("temperature") == 0:
        del rest["temperature"]
    return SamplingParams(**{**rest, **given})


def limited(params: SamplingParams, new_tokens: int | None, *, room: int) -> SamplingParams:
    """`params` with a default limit on the length of the answer, if they have no limit.

    Unlike an explicit limit, the default yields to `min_new_tokens`, and to `room`, the number of tokens that fit after
    the prompt.
    """
    if new_tokens is None or room < 1 or params.max_new_tokens is not None or params.max_length is not None:
        return params
    return replace(params, max_new_tokens=min(max(new_tokens, params.min_new_tokens), max(room, params.min_new_tokens)))
