"""A progress bar of a call: finished answers, generated tokens, elapsed time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from fastgen_jax.core.progress import is_interactive
from fastgen_jax.engine.outputs import RequestOutput

REFRESH_SECONDS = 0.5  # so that the elapsed time advances while a long prompt is computed


class Progress:
    """The progress bar of one call: a context manager; `add` every output.

    It counts tokens up to a total, the sum of `limits`, one per answer; an answer that ends early reduces the total.
    `show=None` shows it on a terminal and in a notebook.
    """

    def __init__(self, limits: Sequence[int], *, show: bool | None) -> None:
        self._left = list(limits)
        self._finished = 0
        shown = is_interactive() if show is None else show
        self._bar: tqdm[NoReturn] = tqdm(
            total=sum(limits),
            unit="token",
            desc=self._description(),
            disable=not shown,
            postfix="computing prompts",
            leave=bool(show) or len(limits) > 1,
        )
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._refresh, daemon=True, name="fastgen-progress") if shown else None

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
        """Advances by an output of answer number `index`."""
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

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            self._bar.refresh()
