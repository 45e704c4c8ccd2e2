"""An engine without work gives its memory back, and takes it again for the next request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

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

HOST_SHARE = 0.5  # of the host's free memory: an accelerator's weights that take less are kept there


class Sleep:
    """Frees the cache and the weights of an idle engine and restores them; compiled programs stay.

    The caller holds the engine's locks. An exception leaves the engine asleep or awake, and a repetition finishes the work.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, metrics: Metrics) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self.reload: Callable[[], Params] | None = None
        """Reads the current weights again; None if they are not those of a checkpoint."""
        self._form: Params = {}  # shapes, dtypes and places of the weights
        self._kept: Params | None = None  # the weights, while asleep

    @property
    def keeps_weights(self) -> bool:
        """Whether to keep the weights when nobody has decided: if they cannot be read again, or fit on the host."""
        if self.reload is None:
            return True
        if jax.default_backend() == "cpu":
            return False
        return _num_bytes(self._runner.params) < HOST_SHARE * available()

    def fall_asleep(self, *, keep_weights: bool) -> None:
        """Frees the cache, and the weights or, with `keep_weights`, the device's copy of them."""
        runner = self._runner
        if runner.is_asleep:
            if not keep_weights:
                self._kept = None
            return
        form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), runner.params)
        freed = _num_bytes((runner.kv_cache, runner.state))
        kept = None
        on_host = jax.default_backend() == "cpu"
        if keep_weights:
            kept = runner.params if on_host else jax.tree.map(np.asarray, runner.params)
        if not (keep_weights and on_host):
            freed += _num_bytes(runner.params)
        self._scheduler.reset_prefix_cache()
        self._form, self._kept = form, kept
        runner.release(delete_params=not (keep_weights and on_host))
        give_back()
        self._metrics.sleeps += 1
        log.info("asleep: %s freed", size(freed))

    def wake(self, params: Params | None) -> None:
        """Takes the memory again, with `params`, or the weights from before.

        Raises ValueError if there are none, or as `replacement_params` and loading a checkpoint do.
        """
        runner = self._runner
        if not runner.is_asleep:
            if params is not None:
                raise ValueError("the engine is awake; assign engine.params to replace its weights")
            return
        start = time.perf_counter()
        if params is not None:
            restored, own, reload = replacement_params(params, self._form, runner.model, runner.config), False, None
        elif self._kept is not None:
            restored, own, reload = _placed(self._kept, self._form), runner.owned_params, self.reload
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
                "engine.wake(params), or keep them with engine.sleep(keep_weights=True)"
            )
        runner.restore(restored, own=own)
        self._kept, self.reload = None, reload
        self._metrics.wakes += 1
        log.info("awake after %.1f s", time.perf_counter() - start)

    def forget(self) -> None:
        """Drops the weights that are kept."""
        self._kept = None


def _placed(kept: Params, form: Params) -> Params:
    """The kept weights where they were; on a CPU they are there."""
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), kept, form)


def _num_bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
