"""Sums over devices in the order of the devices."""

from __future__ import annotations

import os
import subprocess
import sys


def test_every_element_is_added_up_in_the_order_of_the_devices() -> None:
    # In another process: the number of devices is fixed when JAX starts.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pallas_kernels.programs.ordered_sums"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr
