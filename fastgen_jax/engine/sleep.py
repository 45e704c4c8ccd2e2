"""An engine gives its memory back, and takes it again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from fastgen_jax.engine.footprint import size
from fastgen_jax.engine.memory import available, give_back
from fastgen_jax.engine.metrics import Metrics
from fastgen_jax.engine.replacement import replacement_params
from fastgen_jax.engine.runner import Runner
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import Scheduler

log = logging.getLogger(__name__)

WeightsPlace = Literal["device", "host", "dropped"]
"""Where the weights of an engine are that has released its memory."""

HOST_SHARE = 0.5  # of the host's free memory: an accelerator's weights that take less are kept there


class Sleep:
    """Frees the cache and, if told, the weights of an engine that runs nothing, and restores them; programs stay.

    The caller holds the engine's locks. An exception leaves the engine asleep or awake, and a repetition finishes the work.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, metrics: Metrics) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self.reload: Callable[[], Params] | None = None
        """Reads the current weights again; None if they are not those of a checkpoint."""
        self.form: Params = {}
        """Shapes, dtypes and places of the weights, while asleep."""
        self._kept: Params | None = None  # the weights, while asleep

    @property
    def best_place(self) -> WeightsPlace:
        """Where to keep the weights when nobody has decided: nowhere if they can be read again."""
        if self.reload is None:
            return "host"
        if jax.default_backend() == "cpu":
            return "dropped"
        return "host" if _num_bytes(self._runner.params) < HOST_SHARE * available() else "dropped"

    def fall_asleep(self, weights: WeightsPlace) -> None:
        """Frees the cache, and the device's weights unless they stay there; on a CPU the device is the host."""
        runner = self._runner
        if runner.is_asleep:
            if weights == "dropped":
                self._kept = None
            return
        form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), runner.params)
        freed = _num_bytes((runner.kv_cache, runner.state))
        stay = weights == "device" or (weights == "host" and jax.default_backend() == "cpu")
        kept = runner.params if stay else None
        if weights == "host" and not stay:
            kept = jax.tree.map(np.asarray, runner.params)
        if not stay:
            freed += _num_bytes(runner.params)
        self._scheduler.reset_prefix_cache()
        self.form, self._kept = form, kept
        runner.release(delete_params=not stay)
        give_back()
        self._metrics.sleeps += 1
        log.info("asleep: %s freed", size(freed))

    def wake(self, params: Params | None, *, version: int | None = None) -> None:
        """Takes the memory again, with `params`, or the weights from before.

        Raises ValueError if there are none, or as `replacement_params` and loading a checkpoint do.
        """
        runner = self._runner
        if not runner.is_asleep:
            if params is not None:
                raise ValueError("the engine has its memory; call engine.update_params(params) to replace its weights")
            return
        start = time.perf_counter()
        if params is not None:
            restored, own, reload = replacement_params(params, self.form, runner.model, runner.config), False, None
            version = runner.weight_version + 1 if version is None else version
        elif self._kept is not None:
            restored, own, reload = _placed(self._kept, self.form), runner.owned_params, self.reload
        elif self.reload is not None:
            try:
                restored, own, reload = self.reload(), True, self.reload
            except Exception as error:
                raise ValueError(
                    f"the engine is asleep and cannot read its weights again ({error}); restore the checkpoint and repeat"
                ) from error
        else:
            raise ValueError(
                "the engine is asleep without its weights, which are not those of a checkpoint; pass them to "
                "engine.restore_memory(params), or keep them with engine.release_memory(weights='host')"
            )
        runner.restore(restored, version=runner.weight_version if version is None else version, own=own)
        self._kept, self.reload = None, reload
        self._metrics.wakes += 1
        log.info("awake after %.1f s", time.perf_counter() - start)

    def forget(self) -> None:
        """Drops the weights that are kept."""
        self._kept = None


def _placed(kept: Params, form: Params) -> Params:
    """The kept weights where they were; those that stayed there are not copied."""
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), kept, form)


def _num_bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
