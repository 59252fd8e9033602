"""Builds the native core with CMake: the metadata is in pyproject.toml, every source in CMakeLists.txt.

GAS_ENGINE_NATIVE=on|off, GAS_ENGINE_CUDA=auto|on|off, GAS_ENGINE_CUDA_ARCHS="75 80 ...", GAS_ENGINE_MARCH=...
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WAY_OUT = "set GAS_ENGINE_NATIVE=off for a pure-Python install"


def stop(sentence: str) -> SystemExit:
    """The one sentence that a failed build ends with."""
    return SystemExit(f"gas_engine: {sentence}.")


def choice(name: str, *allowed: str) -> str:
    """An environment variable that takes one of a few words; the first is the default."""
    value = os.environ.get(name, "").strip().lower() or allowed[0]
    if value not in allowed:
        raise stop(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


def architectures() -> str:
    """GAS_ENGINE_CUDA_ARCHS as CMake's list: compute capabilities without the dot."""
    words = os.environ.get("GAS_ENGINE_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").replace(".", "").split()
    for word in words:
        if not re.fullmatch(r"\d{2,3}", word):
            raise stop(f"GAS_ENGINE_CUDA_ARCHS must list compute capabilities such as '80 90 120', got {word!r}")
    return ";".join(words)


def tool_folders() -> list[str]:
    """Where the build environment's own cmake and ninja packages keep their programs."""
    folders = []
    for module, name in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        with contextlib.suppress(ImportError, AttributeError):
            folders.append(str(getattr(importlib.import_module(module), name)))
    return folders


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt with Ninja, straight into the place setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        cuda, archs = choice("GAS_ENGINE_CUDA", "auto", "on", "off"), architectures()
        # "native" is an x86 word to older compilers on other machines, and Apple's knows none.
        march = os.environ.get("GAS_ENGINE_MARCH", "") or (
            "native" if platform.machine() in ("x86_64", "AMD64") else "off"
        )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        try:
            import pybind11

            configure = [
                *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
                *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"),
                *(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}", f"-DGAS_ENGINE_CUDA={cuda}"),
                *(f"-DGAS_ENGINE_MARCH={march}", f"-DGAS_ENGINE_VERSION={self.distribution.get_version()}"),
                *([f"-DGAS_ENGINE_CUDA_ARCHS={archs}"] if archs else []),
            ]
            self.step("configure", configure)
            self.step("compile", ["cmake", "--build", str(build)])
        except ImportError:
            raise stop(f"pybind11 is missing: install it, drop --no-build-isolation, or {WAY_OUT}") from None
        except FileNotFoundError:
            raise stop(f"cmake is missing: install cmake and ninja, drop --no-build-isolation, or {WAY_OUT}") from None

    def step(self, name: str, command: list[str]) -> None:
        """Run one CMake step, passing its output on; a failure ends in one sentence with the ways out."""
        print("+", *command, flush=True)
        path = os.pathsep.join([*tool_folders(), os.environ.get("PATH", "")])
        process = subprocess.run(
            [shutil.which(command[0], path=path) or command[0], *command[1:]],
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        print(process.stdout, flush=True)
        if process.returncode == 0:
            return
        log = process.stdout
        said = re.search(r"CUDA: (GAS_ENGINE_CUDA=on, but .*|.* failed|.* knows none .*)", log)
        why = said.group(1) if said else f"the {name} step failed, see the log above"
        if said or re.search(r"nvcc fatal|^FAILED:.*\.cu\.o|CMAKE_CUDA_COMPILER|CMake\w+CUDACompiler", log, re.M):
            remedy = "set GAS_ENGINE_CUDA=off for a CPU build"
        else:
            remedy = "install a C++20 compiler with OpenMP"
        raise stop(f"the native core did not build ({why}); {remedy}, or {WAY_OUT}")


native = choice("GAS_ENGINE_NATIVE", "on", "off") == "on"
setup(
    ext_modules=[Extension("gas_engine._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
