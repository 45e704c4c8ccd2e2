"""The sampling parameters of a step's rows, and the tables on the host from which they are gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from fastgen_jax.scheduling.request import SamplingParams
from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int, Int32, UInt32

MAX_EOS_TOKEN_IDS = 8
_MAX_BANNED_IDS = 16 + MAX_EOS_TOKEN_IDS  # the stop tokens of a usual request, and those of the model
_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = float(np.finfo(np.float32).tiny)

# Columns of the tables, which are also fields of SamplingBatch: name, type, neutral value.
_COLUMNS: tuple[tuple[str, type[np.generic], float], ...] = (
    ("temperature", np.float32, 0),
    ("top_k", np.int32, 0),
    ("top_p", np.float32, 1),
    ("min_p", np.float32, 0),
    ("presence_penalty", np.float32, 0),
    ("frequency_penalty", np.float32, 0),
    ("repetition_penalty", np.float32, 1),
    ("has_bias", np.int32, 0),
    ("has_mask", np.int32, 0),
    ("seeds", np.uint32, 0),
    ("ban_before", np.int32, 0),
)
_FLAGS = ("any_sampling", "any_penalties", "any_bias", "any_logprobs", "any_masks")  # bit i of a slot's flags sets field i


@pytree
class SamplingBatch:
    """The sampling parameters of each sampled row. Unused rows have `slots` = max_num_seqs and temperature 0."""

    slots: Int32[Array, " R"]
    """Row of the sampler's state; max_num_seqs where the row belongs to no sequence."""
    positions: Int32[Array, " R"]
    """Position, in its sequence, of the token being sampled."""
    temperature: Float32[Array, " R"]
    """0 chooses the most likely token."""
    top_k: Int32[Array, " R"]
    """0 keeps every token."""
    top_p: Float32[Array, " R"]
    """1 keeps every token."""
    min_p: Float32[Array, " R"]
    """Least probability kept, as a fraction of the most likely token's; 0 keeps every token."""
    presence_penalty: Float32[Array, " R"]
    """Subtracted from the logits of generated tokens."""
    frequency_penalty: Float32[Array, " R"]
    """The same, times how often each was generated."""
    repetition_penalty: Float32[Array, " R"]
    """Divides positive and multiplies negative logits of tokens in the prompt or generated; 1 does nothing."""
    has_bias: Int32[Array, " R"]
    """1 where the slot's logit bias belongs to this row, not to an earlier sequence."""
    has_mask: Int32[Array, " R"]
    """1 where only the tokens of the slot's mask may come next."""
    seeds: UInt32[Array, " R"]
    stop_ids: Int32[Array, "R Z"]
    """Tokens banned at positions before `ban_before`; V in unused entries."""
    ban_before: Int32[Array, " R"]
    """Prompt length + min_new_tokens, 0 for no ban."""
    targets: Int32[Array, " R"]
    """Token to report instead of a sampled one (rows for prompt log-probabilities); V: sample one."""
    writes_token: Int32[Array, " R"]
    """1 where the token becomes the sequence's last one."""
    any_sampling: Int32[Array, ""]
    """0 skips temperature and everything after it for all rows; likewise the flags that follow."""
    any_penalties: Int32[Array, ""]
    any_bias: Int32[Array, ""]
    any_bans: Int32[Array, ""]
    any_logprobs: Int32[Array, ""]
    any_masks: Int32[Array, ""]
    any_top_logprobs: Int32[Array, ""]


def sampling_fields(num_rows: int) -> list[tuple[str, tuple[int, ...], type[np.generic]]]:
    """Name, shape and dtype of each field of `SamplingBatch` for R = `num_rows`, in packing order."""
    return [
        ("slots", (num_rows,), np.int32),
        ("positions", (num_rows,), np.int32),
        *((name, (num_rows,), dtype) for name, dtype, _ in _COLUMNS),
        ("stop_ids", (num_rows, _MAX_BANNED_IDS), np.int32),
        ("targets", (num_rows,), np.int32),
        ("writes_token", (num_rows,), np.int32),
        *((name, (), np.int32) for name in (*_FLAGS, "any_bans", "any_top_logprobs")),
    ]


def validate(params: SamplingParams, vocab_size: int, *, eos_token_ids: Sequence[int] = ()) -> None:
    """Checks what `SamplingParams` cannot check itself, because it does not know the model.

    Raises:
        ValueError: a token id is outside the vocabulary, or there are too many tokens to ban for `min_new_tokens`.
    """
    biased = [token_id for token_id, _ in _bias_pairs(params)]
    for name, ids in (
        ("logit_bias", biased),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} names token {token_id}, outside the vocabulary, 0..{vocab_size - 1}; "
                    "remove it, and check that the ids come from this model's tokenizer"
                )
    _banned_ids(params, eos_token_ids)


class SamplingTables:
    """One row of sampling parameters per slot, as NumPy columns; the last row is neutral.

    `admit` fills a row when a sequence gets a slot; `fill` copies the rows of a step into the packed array.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._columns = {name: np.full(max_num_seqs + 1, default, dtype) for name, dtype, default in _COLUMNS}
        self._stop_ids = np.full((max_num_seqs + 1, _MAX_BANNED_IDS), vocab_size, np.int32)
        self._flags = np.zeros(max_num_seqs + 1, np.uint8)
        self._process_prompt = np.zeros(max_num_seqs + 1, bool)
        self._wants_top = np.zeros(max_num_seqs + 1, bool)
        self.next_tokens: dict[int, int] = {}
        """The token to report instead of a sampled one, of each slot that has one."""

    @staticmethod
    def clear(views: Mapping[str, np.ndarray], *, max_num_seqs: int, vocab_size: int) -> None:
        """Writes neutral rows into `views`, arrays by the names of `sampling_fields`."""
        for view in views.values():
            view[...] = 0
        for name, _, default in _COLUMNS:
            views[name][...] = default
        views["slots"][...] = max_num_seqs
        views["stop_ids"][...] = vocab_size
        views["targets"][...] = vocab_size

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        eos_token_ids: Sequence[int],
        seed: int,
        num_prompt_tokens: int,
        has_mask: bool = False,
        next_token_id: int | None = None,
    ) -> bool:
        """Writes the parameters of a sequence to `slot`; true if the device needs a `reset_slot` before its next step."""
        has_penalties = params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
        has_bias = len(_bias_pairs(params)) > 0
        temperature = 1.0 if params.temperature is None else params.temperature
        top_k = params.top_k or 0
        banned = _banned_ids(params, eos_token_ids)
        row = {
            # Neither an underflow to 0, which is greedy, nor an overflow to infinity.
            "temperature": 0.0 if params.greedy else min(max(temperature, _FLOAT_TINY), _FLOAT_MAX),
            "top_k": top_k if top_k < self._vocab_size else 0,
            "top_p": 1.0 if params.top_p is None else params.top_p,
            "min_p": params.min_p or 0.0,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "has_bias": has_bias,
            "has_mask": has_mask,
            "seeds": seed,
            "ban_before": num_prompt_tokens + params.min_new_tokens if banned else 0,
        }
        for name, value in row.items():
            self._columns[name][slot] = value
        self._stop_ids[slot, : len(banned)] = banned
        self._stop_ids[slot, len(banned) :] = self._vocab_size
        raised = (not params.greedy, has_penalties, has_bias, params.logprobs is not None, has_mask)
        self._flags[slot] = sum(1 << bit for bit, is_raised in enumerate(raised) if is_raised)
        self._process_prompt[slot] = params.logprobs_mode == "processed" and params.prompt_logprobs is not None
        self._wants_top[slot] = max(params.logprobs or 0, params.prompt_logprobs or 0) > 0
        self.next_tokens.pop(slot, None)
        if next_token_id is not None:
            self.next_tokens[slot] = next_token_id
        return has_penalties or has_bias

    def fill(
        self,
        views: Mapping[str, np.ndarray],
        *,
        slots: Int[np.ndarray, " n"],
        positions: Int[np.ndarray, " n"],
        writes_token: Int[np.ndarray, " n"],
        targets: Mapping[int, int],
    ) -> None:
        """Writes the first rows of a step into `views`, cleared arrays by the names of `sampling_fields`.

        `positions` are those of the tokens to be sampled. `targets` maps a row to the token that it reports instead of a
        sampled one. `writes_token` is 0 for a row of a prompt, which is neutral except for its target, unless its request
        wants processed log-probabilities of the prompt.
        """
        n = len(slots)
        rows = slots
        if not writes_token.all():
            rows = np.where(writes_token | self._process_prompt.take(slots), slots, self._max_num_seqs)
        views["slots"][:n] = rows
        views["positions"][:n] = positions
        views["writes_token"][:n] = writes_token
        for name, column in self._columns.items():
            column.take(rows, out=views[name][:n], mode="clip")  # "raise" would buffer the output
        flags = int(np.bitwise_or.reduce(self._flags.take(rows)))
        for bit, name in enumerate(_FLAGS):
            views[name][...] = flags >> bit & 1
        if (views["ban_before"][:n] > positions).any():
            self._stop_ids.take(rows, axis=0, out=views["stop_ids"][:n], mode="clip")
            views["any_bans"][...] = 1
        views["any_top_logprobs"][...] = self._wants_top.take(slots).any()
        if targets:
            views["targets"][list(targets)] = list(targets.values())
            views["any_logprobs"][...] = 1


def _bias_pairs(params: SamplingParams) -> tuple[tuple[int, float], ...]:
    return cast("tuple[tuple[int, float], ...]", params.logit_bias)  # converted when constructed


def _banned_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
    """Tokens that must not come before `min_new_tokens` others."""
    if params.min_new_tokens == 0:
        return []
    ids = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
    if len(ids) > _MAX_BANNED_IDS:
        raise ValueError(
            f"min_new_tokens is {params.min_new_tokens}, which at first bans all {len(ids)} stop and end-of-sequence "
            f"tokens, but at most {_MAX_BANNED_IDS} can be; remove stop_token_ids, or use min_new_tokens=0"
        )
    return ids
