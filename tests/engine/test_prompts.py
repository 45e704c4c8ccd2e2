"""Prompts in every supported form, and invalid ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.prompts import plain_prompt, split_prompts
from fastgen_jax.scheduling import SamplingParams
from tests.serving.tiny_server import engine as engine_with_tokenizer
from tests.tiny import greedy, tiny_engine

USER = {"role": "user", "content": "Hi"}


class OnADevice:
    """An array that NumPy cannot read, such as PyTorch's on a GPU."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Tensor:
    """An array of a library that NumPy can read."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __iter__(self):
        return map(Tensor, self.values)

    def __index__(self):
        return int(self.values)


class Shown(str):
    """A text whose str() is different, as for members of a string enum."""

    def __str__(self):
        return f"Shown({super().__str__()})"


@pytest.mark.parametrize(
    ("prompts", "plain"),
    [
        ("Hi", ["Hi"]),
        (np.str_("Hi"), ["Hi"]),
        (Shown("Hi"), ["Hi"]),
        (["Hi", "there"], ["Hi", "there"]),
        (("Hi", "there"), ["Hi", "there"]),
        ((text for text in ("Hi", "there")), ["Hi", "there"]),
        (np.array(["Hi", "there"]), ["Hi", "there"]),
        (np.array(["Hi", "there"], object), ["Hi", "there"]),
        ([5, 6], [(5, 6)]),
        ((5, 6), [(5, 6)]),
        (range(5, 7), [(5, 6)]),
        ((token for token in (5, 6)), [(5, 6)]),
        ([np.int32(5), np.uint8(6)], [(5, 6)]),
        (np.array([5, 6]), [(5, 6)]),
        (np.array([5, 6], np.uint16), [(5, 6)]),
        (jnp.array([5, 6]), [(5, 6)]),
        (list(jnp.array([5, 6])), [(5, 6)]),
        (Tensor([5, 6]), [(5, 6)]),
        (list(Tensor([5, 6])), [(5, 6)]),
        ([[5], (6, 7)], [(5,), (6, 7)]),
        ([jnp.array([5]), np.array([6, 7]), Tensor([8])], [(5,), (6, 7), (8,)]),
        (np.array([[5, 6], [7, 8]]), [(5, 6), (7, 8)]),
        (jnp.array([[5, 6]]), [(5, 6)]),
        ((prompt for prompt in ([5], "Hi")), [(5,), "Hi"]),
        (USER, [[USER]]),
        ([USER], [[USER]]),
        ([USER, USER], [[USER, USER]]),
        ([[USER], [USER, USER]], [[USER], [USER, USER]]),
        (["Hi", [USER], [5]], ["Hi", [USER], (5,)]),
    ],
)
def test_a_prompt_in_any_form_becomes_text_token_ids_or_messages(prompts, plain):
    found = [plain_prompt(prompt) for prompt in split_prompts(prompts)]
    assert found == plain
    assert all(type(prompt) is str for prompt in found if isinstance(prompt, str))
    assert all(type(token) is int for prompt in found if isinstance(prompt, tuple) for token in prompt)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"Hi", r"the prompt is bytes; convert it to text with prompt.decode\(\)"),
        ([b"Hi", b"there"], "the prompt is bytes"),
        (bytearray(b"Hi"), "the prompt is bytearray"),
        ({"Hi", "there"}, "a set, which has no order; pass a list"),
        (5, r"the prompt is 5; pass text, token ids, or chat messages; one token id is \[id\]"),
        (None, "the prompt is None; pass text"),
        ([None], "the prompt is None; pass text"),
        ([5, "Hi"], "the prompt contains 'Hi'"),
        (["Hi", 5], "prompts contains 5 among other prompts; put each prompt of token ids"),
        (["Hi", USER], "among other prompts; .* each conversation, into a separate list"),
        ([USER, "Hi"], "the prompt contains 'Hi' among chat messages"),
        ([5.0, 6.0], "the prompt is 5.0; pass text"),
        ([True, False], "the prompt is True; pass text"),
        (np.array([5.0, 6.0]), r"an array of float64; token ids are integers: .* \.astype\('int32'\)"),
        (jnp.array([True, False]), "an array of bool"),
        ([np.array([[5, 6]])], r"an array of shape \(1, 2\); token ids of one prompt are one-dimensional"),
        (np.array(5), r"an array of shape \(\); .* one token id is \[id\]"),
        (np.zeros((1, 1, 1), int), r"array of shape \(1, 1, 1\)"),
        (OnADevice(), r"a OnADevice that cannot be read as a NumPy array \(can't convert cuda:0"),
        ({"messages": [USER]}, r"the keys messages; pass only prompt\['messages'\]"),
        ({"input_ids": [5], "attention_mask": [1]}, r"keys input_ids, attention_mask; pass only prompt\['input_ids'\]"),
        ({"text": "Hi"}, "keys text; a chat message is {'role': ..., 'content': ...}"),
        ([], "no prompts"),
        (iter(()), "no prompts"),
    ],
)
def test_an_invalid_prompt_is_refused_with_a_remedy(prompts, message):
    with pytest.raises(ValueError, match=message):
        [plain_prompt(prompt) for prompt in split_prompts(prompts)]


def test_the_engine_accepts_the_same_forms_as_the_pipeline():
    engine = tiny_engine()
    for ids in ([5, 6], np.array([5, 6]), jnp.array([5, 6]), Tensor([5, 6]), iter((5, 6))):
        assert engine.encode(ids) == (5, 6)  # pyright: ignore[reportArgumentType] (an iterator is no Sequence)
    for prompt, message in ((b"Hi", "is bytes"), (jnp.array([95, 96]), "token id 96 is outside"), ([-1], "token id -1")):
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, greedy(1))
    assert not engine.has_work


def test_a_single_message_is_a_conversation_of_one():
    engine = engine_with_tokenizer()
    assert engine.encode(USER) == engine.encode([USER])
    with pytest.raises(ValueError, match="keys text"):
        engine.add({"text": "Hi"}, SamplingParams(max_new_tokens=1))
