"""A progress bar that lives from the first second: answers that are done, tokens that have come, time that goes by."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from fastgen_jax.core.progress import is_watched
from fastgen_jax.engine.outputs import RequestOutput

BEAT_SECONDS = 0.5  # between two looks at the clock while a long prompt is read


class Progress:
    """The bar of one call: a context manager that is told of every output.

    It counts tokens, out of the most that may come; an answer that ends early takes the rest off. `limits` has that number
    for each answer. `show=None` shows it where somebody looks on: on a terminal and in a notebook.
    """

    def __init__(self, limits: Sequence[int], *, show: bool | None) -> None:
        self._left = list(limits)
        self._finished = 0
        shown = is_watched() if show is None else show
        self._bar: tqdm[NoReturn] = tqdm(
            total=sum(limits),
            unit="token",
            desc=self._description(),
            disable=not shown,
            postfix="reading prompts",
            leave=bool(show) or len(limits) > 1,
        )
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._beat, daemon=True, name="fastgen-progress") if shown else None

    def __enter__(self) -> Progress:
        if self._clock is not None:
            self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._clock is not None:
            self._clock.join()
        self._bar.close()

    def add(self, index: int, output: RequestOutput) -> None:
        """Moves on by an output of answer number `index`."""
        bar, num_tokens = self._bar, len(output.new_token_ids)
        if bar.disable:
            return
        if num_tokens and not bar.n:
            bar.set_postfix_str("", refresh=False)
        self._left[index] -= num_tokens
        if output.finished:
            bar.total -= self._left[index]
            self._finished += 1
            bar.set_description(self._description(), refresh=False)
        bar.update(num_tokens)

    def _description(self) -> str:
        return f"answered {self._finished} of {len(self._left)}"

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._bar.refresh()
