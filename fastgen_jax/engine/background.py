"""Compiles the smaller step programs in a thread, while the engine answers with those that it has."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from fastgen_jax.engine import compile_cache
from fastgen_jax.engine.programs import Program, Programs
from fastgen_jax.engine.samplers import Sampler, SamplerPrograms
from fastgen_jax.engine.sampling.sampler import Work

log = logging.getLogger(__name__)


class BackgroundCompiler:
    """Compiles some of `programs` in a thread and passes each to `add`, which makes it available.

    The thread holds no reference to the engine: `add` is looked up again for each program, and the thread ends if its
    object is gone. It also ends after the program that it is compiling when `stop` is called or the main thread ends,
    which waits for it; XLA cannot be interrupted. If a compilation fails, a warning is logged, and the engine goes on
    with the programs that it has.
    """

    def __init__(
        self,
        programs: Programs | SamplerPrograms,
        missing: Sequence[tuple[int, Work]],
        add: Callable[[Program | Sampler], bool],
        *,
        otherwise: str = "the engine goes on with its larger programs, smaller steps take longer. To see the failure at the "
        "start, set background_compile=False",
    ) -> None:
        """`missing` are arguments of `programs.compile`; `add` is a bound method, false if no more programs are wanted.

        `otherwise`: what a failure means.
        """
        self._otherwise = otherwise
        self._stopping = threading.Event()
        self.failure: str | None = None
        """The error that ended the compilation early."""
        self._thread = threading.Thread(
            target=self._run, args=(programs, tuple(missing), weakref.WeakMethod(add)), name="fastgen-compiler"
        )

    def start(self) -> None:
        """Starts the thread, if nothing has started it before."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether nothing is being compiled, and nothing will be."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the thread has ended."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def stop(self) -> None:
        """Makes the thread end after the program that it is compiling, without waiting for it."""
        self._stopping.set()

    def _run(
        self,
        programs: Programs | SamplerPrograms,
        missing: Sequence[tuple[int, Work]],
        add: weakref.WeakMethod[Callable[[Program | Sampler], bool]],
    ) -> None:
        start = time.monotonic()
        for done, (size, work) in enumerate(missing):
            if self._stopping.is_set() or not threading.main_thread().is_alive():
                return
            try:
                program = programs.compile(size, work)
                use = add()
                if use is None or self._stopping.is_set() or not use(program):
                    return
                del use, program
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
                log.warning(
                    "compiling the program for %s failed (%s); %s",
                    f"{size} rows of logits" if isinstance(programs, SamplerPrograms) else f"steps of {size} tokens",
                    self.failure,
                    self._otherwise,
                )
                return
            log.info(
                "compiled %d of %d programs in the background in %.1f s", done + 1, len(missing), time.monotonic() - start
            )
        compile_cache.send(programs.folder)
