"""Adds prebuilt C++ kernels to the wheel if the environment variable PALLAS_KERNELS_PREBUILT names their folder.

`make wheels` compiles them, see pallas_kernels/native/prebuild.py. All else is in pyproject.toml. The libraries are opened
with ctypes and use no interface of Python, so that one wheel per platform serves every version of it.
"""

import json
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = os.environ.get("PALLAS_KERNELS_PREBUILT")


class BuildWithKernels(build_py):
    """Copies the libraries and their manifest into the package."""

    def run(self) -> None:
        super().run()
        shutil.copytree(FOLDER, Path(self.build_lib) / "pallas_kernels" / "native" / "prebuilt")


class PlatformDistribution(Distribution):
    """Installed where platform-specific packages are."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any version of Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", json.loads((Path(FOLDER) / "manifest.json").read_text())["tag"]


if FOLDER:
    setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
else:
    setup()
