"""The adapters that are loaded in an engine: their names, their places in the stacks, and the requests that use them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import jax

from fastgen_jax.checkpoint import read_peft
from fastgen_jax.engine.adapter_stacks import Stacks, adapter_arrays, write
from fastgen_jax.engine.config import check_adapter_name
from fastgen_jax.engine.journal import Journal
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.updating import Updating
from fastgen_jax.models.targets import Lora
from fastgen_jax.scheduling import Request

AdapterSource = Lora | str | os.PathLike[str]
"""Leaves as `lora_params` returns them, or a folder that PEFT has saved."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A loaded adapter."""

    name: str
    source: str
    """Its folder; empty if it was passed as arrays."""
    version: int
    """The version of its weights, which outputs of its requests carry."""
    place: int
    """Its place in the stacks on the device."""
    load: int
    """Number of this load: what another one of the same name has computed is not its own."""


class Adapters:
    """The operations of `Engine` on its adapters; see the methods there."""

    def __init__(self, runner: Runner, journal: Journal, updating: Updating) -> None:
        self._runner = runner
        self._journal = journal
        self._updating = updating
        self._loads = itertools.count()
        self.table: Mapping[str, Adapter] = {}
        """Those that requests can use, by name; replaced, never changed."""

    def check(self, name: str | None) -> None:
        """ValueError if a request names an adapter that is not loaded."""
        if name is not None and name not in self.table:
            raise ValueError(unknown_adapter(name, self.table))

    def assign(self, request: Request) -> Request:
        """`request` with the place of its adapter, and with prefixes that only this load of it shares."""
        name = request.params.adapter
        if name is None:
            return request
        self.check(name)
        adapter = self.table[name]
        return replace(request, adapter_place=adapter.place, cache_salt=f"{request.cache_salt}\n{name}\n{adapter.load}")

    def load(self, name: str, source: AdapterSource, *, scale: float | None, version: int) -> None:
        """See `Engine.load_adapter`."""
        check_adapter_name(name)
        journal = self._journal
        journal.check()
        self._free_place(name)  # before it is read
        arrays = self._arrays(source, scale)
        with journal.turn, journal.lock:
            journal.check()
            adapter = Adapter(
                name=name,
                source=os.fspath(source) if isinstance(source, str | os.PathLike) else "",
                version=_checked(version),
                place=self._free_place(name),
                load=next(self._loads),
            )
            journal.exclusive(lambda: self._put(adapter, arrays))

    def update(self, name: str, source: AdapterSource, *, scale: float | None, version: int | None, recompute: bool) -> int:
        """See `Engine.update_adapter`."""
        journal = self._journal
        journal.check()
        self.check(name)
        arrays = self._arrays(source, scale)
        with journal.turn, journal.lock:
            journal.check()
            self.check(name)
            before = self.table[name]
            after = replace(
                before,
                source=os.fspath(source) if isinstance(source, str | os.PathLike) else "",
                version=before.version + 1 if version is None else _checked(version),
            )
            self._updating.exchange(lambda: self._put(after, arrays), recompute=recompute)
        return after.version

    def unload(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        with self._journal.turn, self._journal.lock:
            self._journal.check()
            self.check(name)
            self.table = {other: adapter for other, adapter in self.table.items() if other != name}

    def _arrays(self, source: AdapterSource, scale: float | None) -> Stacks:
        runner = self._runner
        if isinstance(source, str | os.PathLike):
            if scale is not None:
                raise ValueError(f"scale is {scale}, but a folder of PEFT says its own in adapter_config.json; omit it")
            source = read_peft(os.fspath(source), runner.model)
        arrays = adapter_arrays(source, runner.model, runner.config, scale=1.0 if scale is None else scale)
        return jax.block_until_ready(arrays)

    def _put(self, adapter: Adapter, arrays: Stacks) -> None:
        runner = self._runner
        assert runner.adapters is not None, "there is a place"
        stacks = jax.block_until_ready(write(runner.adapters, arrays, adapter.place))
        versions = {**runner.adapter_versions, adapter.place: adapter.version}
        table = {**self.table, adapter.name: adapter}
        runner.adapters, runner.adapter_versions, self.table = stacks, versions, table

    def _free_place(self, name: str) -> int:
        """A place that no adapter and no unfinished request uses; ValueError if there is none, or the name is taken."""
        count = self._runner.config.num_adapters
        if count == 0:
            raise ValueError(
                f"adapter {name!r} cannot be loaded: this engine has no place for adapters; start it with max_adapters=1"
            )
        if name in self.table:
            raise ValueError(f"an adapter {name!r} is loaded already; update or unload it, or choose another name")
        loaded = {adapter.place for adapter in self.table.values()}
        in_use = {state.sequence.request.adapter_place for state in [*self._journal.states.values()]}
        free = [place for place in range(count) if place not in loaded | in_use]
        if free:
            return free[0]
        if len(loaded) < count:
            raise ValueError(
                f"adapter {name!r} cannot be loaded yet: requests of an unloaded adapter are unfinished; retry when "
                f"they are done, or start with max_adapters={count + 1}"
            )
        names = ", ".join(sorted(self.table))
        raise ValueError(
            f"adapter {name!r} cannot be loaded: max_adapters is {count}, and {names} are loaded; unload one, or start with "
            f"max_adapters={count + 1}"
        )


def unknown_adapter(name: str, loaded: Iterable[str]) -> str:
    """What is wrong with the name of an adapter that is not loaded."""
    names = ", ".join(sorted(loaded))
    return f"adapter is {name!r}, which is not loaded; " + (f"loaded: {names}" if names else "no adapter is")


def _checked(version: int) -> int:
    if isinstance(version, bool) or not isinstance(version, int):
        raise ValueError(f"version is {version!r}; pass an int")
    return version
