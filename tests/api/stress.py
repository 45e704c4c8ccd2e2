"""A pipeline under stress: interrupted at random moments, shared by many threads, with correct answers throughout.

    python -m tests.api.stress --interrupts 200 --threads 8 --calls 50

Interrupts are SIGINT and asynchronous exceptions, in calls, in streams and in a loop over `Engine.step`. After each of
them the answers must be those of a single request, and the outputs of the loop must continue as if nothing had happened.
Threads make calls, read one or several streams, leave streams early and use asyncio, all at the same time. Prints what was
done, and exits with status 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fastgen_jax
from fastgen_jax import Pipeline, RequestOutput, Research, SamplingParams

ENGINE: dict[str, Any] = {
    "token_budget": 32,
    "budget_ladder": (8,),
    "max_num_seqs": 8,
    "block_size": 8,
    "num_blocks": 96,
    "max_context_len": 128,
    "background_compile": False,
}
PROMPTS = [
    "Mr. Speaker",
    "My fellow Americans, tonight",
    "The state of our union is",
    "We must",
    "I ask the Congress to",
    "In the past year",
    "America",
    "Let us",
    "Our economy has created more than a million jobs since",
    "Thank you",
    "The men and women who serve this nation in uniform deserve",
    "To keep our people safe we will",
]
WAIT = 60.0  # seconds; an interrupt that has not arrived by then will not arrive


@dataclass
class PipelineStress:
    """Uses of a pipeline and the errors found; `sampled` requests draw tokens from seeds instead of being greedy."""

    pipe: Pipeline
    seed: int = 0
    sampled: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.options = []
        for number in range(len(PROMPTS)):
            how = {"seed": number} if self.sampled else {"do_sample": False}
            self.options.append({"max_new_tokens": draw.randint(3, 40), "ignore_eos": True, **how})
        self.alone = [self.pipe(p, **o)[0].token_ids for p, o in zip(PROMPTS, self.options, strict=True)]

    # Ways to use a pipeline, for some prompts by number; the results are checked

    def call(self, *numbers: int) -> None:
        """One call per prompt."""
        for number in numbers:
            (response,) = self.pipe(PROMPTS[number], **self.options[number])
            self._check("call", number, response.token_ids)

    def together(self, *numbers: int) -> None:
        """All prompts in one call, with the length of the first."""
        responses = self.pipe([PROMPTS[number] for number in numbers], progress=False, **self.options[numbers[0]])
        for number, response in zip(numbers, responses, strict=True):
            self._check("batch", number, response.token_ids, self.options[numbers[0]])

    def stream(self, *numbers: int) -> None:
        """Streams that are read in turns, so that each one waits for the others."""
        streams = [self.pipe.stream(PROMPTS[number], **self.options[number]) for number in numbers]
        tokens: list[list[int]] = [[] for _ in numbers]
        unfinished = list(range(len(numbers)))
        while unfinished:
            for i in [*unfinished]:
                output = next(streams[i], None)
                if output is None:
                    unfinished.remove(i)
                else:
                    tokens[i] += output.new_token_ids
        for number, given in zip(numbers, tokens, strict=True):
            self._check("stream", number, tuple(given))

    def follow(self, *numbers: int) -> None:
        """All prompts in one stream."""
        options = self.options[numbers[0]]
        tokens: list[list[int]] = [[] for _ in numbers]
        for index, output in self.pipe([PROMPTS[number] for number in numbers], stream=True, **options):
            tokens[index] += output.new_token_ids
        for number, given in zip(numbers, tokens, strict=True):
            self._check("followed", number, tuple(given), options)

    def leave(self, *numbers: int) -> None:
        """Streams that are closed or dropped after their first token."""
        for number in numbers:
            stream = self.pipe.stream(PROMPTS[number], **self.options[number])
            tokens = next(stream).new_token_ids
            if number % 2:
                stream.close()
            del stream
            self._check("left early", number, tokens, length=1)

    def with_asyncio(self, *numbers: int) -> None:
        """One task per prompt."""

        async def ask() -> None:
            await asyncio.gather(*(asyncio.to_thread(self.call, number) for number in numbers))

        asyncio.run(ask())
        self.seen["through asyncio"] += len(numbers)

    def step(self, *numbers: int) -> StepLoop:
        """A loop over the engine's steps; the only use that can be resumed."""
        return StepLoop(self, numbers)

    def _check(
        self,
        kind: str,
        number: int,
        given: tuple[int, ...],
        options: dict[str, Any] | None = None,
        length: int | None = None,
    ) -> None:
        self.seen[kind] += 1
        expected = self.alone[number]
        if (
            options is not None
        ):  # greedy answers of different lengths have a common prefix; seeds are those of the first prompt
            length = min(options["max_new_tokens"], len(expected))
            expected = expected if options.get("seed", number) == number else given
        if given[:length] != expected[:length]:
            self.wrong.append(f"{kind} of {PROMPTS[number]!r}: {given} instead of {expected}")

    # Interrupts

    def interrupt(self, times: int) -> None:
        """Interrupts each use in each way at a random moment, and makes a call after each interrupt."""
        draw = random.Random(self.seed + 1)
        ways = {"SIGINT": send_signal, "asynchronous exception": raise_in_thread}
        uses = (self.call, self.together, self.stream, self.follow, self.step)
        numbers = [draw.sample(range(len(PROMPTS)), 3) for _ in uses]
        seconds = [self._seconds(use, some) for use, some in zip(uses, numbers, strict=True)]
        num_early = num_late = 0
        while num_early < times:
            which = (num_early + num_late) % len(uses)
            way = draw.choice(list(ways))
            loop = self.step(*numbers[which]) if uses[which] == self.step else None
            use = loop.run if loop else lambda which=which: uses[which](*numbers[which])
            is_early = interrupted(use, ways[way], delay=draw.uniform(0, seconds[which]))
            num_early += is_early
            num_late += not is_early
            if num_late > 5 * times + 100:
                raise RuntimeError(f"{num_late} interrupts came after the end of the operation")
            self.seen[f"{way} in {uses[which].__name__}" if is_early else "interrupt that came too late"] += 1
            if loop is not None:
                loop.run()
            self.call(draw.randrange(len(PROMPTS)))
        self._check_idle()

    def _seconds(self, use: Callable[..., StepLoop | None], numbers: list[int]) -> float:
        """Seconds that a use takes the second time."""
        for _ in range(2):
            start = time.perf_counter()
            loop = use(*numbers)
            if loop is not None:
                loop.run()
        return time.perf_counter() - start

    # Sharing

    def share(self, num_threads: int, times: int) -> None:
        """Uses the pipeline from many threads, `times` times in each."""
        uses = (self.call, self.together, self.stream, self.follow, self.leave, self.with_asyncio)

        def one(seed: int) -> None:
            draw = random.Random(seed)
            try:
                for _ in range(times):
                    draw.choice(uses)(*draw.sample(range(len(PROMPTS)), draw.randint(1, 3)))
            except Exception as error:
                self.wrong.append(f"{type(error).__name__} in a thread: {error}")

        threads = [threading.Thread(target=one, args=(self.seed + i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        research = Research(self.pipe.engine)
        while any(thread.is_alive() for thread in threads):
            logits = research.put(["mine"], [[5, 6, 7]])  # at the same time
            research.flush("mine")
            self.seen["concurrent put" if logits.any() else "put returned zeros"] += 1
            threads[0].join(0.05)
        for thread in threads:
            thread.join()
        self._check_idle()

    def _check_idle(self) -> None:
        engine = self.pipe.engine
        self.call(0)  # it ends after all earlier requests
        end = time.monotonic() + WAIT
        while engine.has_work and time.monotonic() < end:
            time.sleep(0.01)
        engine.scheduler.check_integrity()
        if engine.has_work or engine.scheduler.num_free_blocks != engine.config.num_blocks:
            self.wrong.append(f"left behind: {engine.request_ids}, {engine.scheduler.num_free_blocks} blocks are free")


class StepLoop:
    """Requests added to an engine and stepped to their end; call `run` until it returns."""

    def __init__(self, stress: PipelineStress, numbers: tuple[int, ...]) -> None:
        self.stress = stress
        self.engine = stress.pipe.engine
        self.numbers = numbers
        self.missing = list(numbers)
        self.outputs: list[RequestOutput] = []

    def run(self) -> None:
        """Adds missing requests, steps to the end, and checks the answers once."""
        engine = self.engine
        while self.missing:
            number = self.missing[-1]
            try:
                engine.add(PROMPTS[number], SamplingParams(**self.stress.options[number]), request_id=f"step-{number}")
            except ValueError:  # it was added, but the interrupt came before `missing.pop`
                if f"step-{number}" not in engine.request_ids:
                    raise
            self.missing.pop()
        outputs = self.outputs
        while engine.has_work:
            outputs += engine.step()
        while self.numbers:
            number = self.numbers[0]
            tokens = [t for o in outputs if o.request_id == f"step-{number}" for t in o.new_token_ids]
            self.stress._check("step loop", number, tuple(tokens))
            self.numbers = self.numbers[1:]


def interrupted(operation: Callable[[], Any], interrupt: Callable[[int], None], *, delay: float) -> bool:
    """Runs an operation that is interrupted after `delay` seconds; returns whether the interrupt came before its end."""
    thread = threading.get_ident()
    timer = threading.Timer(delay, interrupt, (thread,))
    is_early = True
    try:
        timer.start()
        operation()
        is_early = False
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            time.sleep(0.001)
    except KeyboardInterrupt:
        timer.join()
        return is_early
    raise RuntimeError(f"no interrupt came within {WAIT:g} seconds")


def send_signal(thread: int) -> None:
    """What ^C does."""
    signal.pthread_kill(thread, signal.SIGINT)


def raise_in_thread(thread: int) -> None:
    """What a debugger or a notebook extension may do."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


def main() -> int:
    """Runs what the command line selects; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/sotu-1m")
    parser.add_argument("--interrupts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=50, help="uses of the pipeline in each thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampled", action="store_true", help="draw tokens from seeds instead of taking the best")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with fastgen_jax.pipeline(arguments.model, **ENGINE) as pipe:
        stress = PipelineStress(pipe, seed=arguments.seed, sampled=arguments.sampled)
        stress.interrupt(arguments.interrupts)
        stress.share(arguments.threads, arguments.calls)
    for kind, count in sorted(stress.seen.items()):
        print(f"{count:6d}  {kind}")
    print(f"{len(stress.wrong):6d}  wrong")
    for line in stress.wrong:
        print(line)
    return bool(stress.wrong)


if __name__ == "__main__":
    sys.exit(main())
