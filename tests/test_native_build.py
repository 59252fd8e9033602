"""The native core as a build: its C++ tests, its ways to fail, and what ptxas says of every kernel."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=PATH)

needs_source = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")
needs_build = pytest.mark.skipif(
    CMAKE is None or shutil.which("ninja", path=PATH) is None or importlib.util.find_spec("pybind11") is None,
    reason="needs cmake, ninja and pybind11 in this environment (pip install cmake ninja pybind11)",
)
pytestmark = needs_source


def environment(**variables: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GAS_ENGINE_") and k not in ("CXX", "CXXFLAGS")}
    return {**clean, "PATH": PATH, **variables}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: nothing here touches the tree or the environment under test."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "README.md").write_text("# gas_engine\n")
    (copy / "gas_engine").mkdir()
    (copy / "gas_engine" / "__init__.py").touch()
    return copy


def build(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build`: the same code path as pip, without pip's frame around the output."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=tree,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# What a build for this machine does not reach: the widths and the fallbacks of other ones, and memory that is
# read or written where it should not be.
HOSTS = {
    "native": ("native", "OFF"),
    "avx2": ("x86-64-v3", "OFF"),
    "sse2": ("x86-64", "OFF"),
    "sanitized": ("native", "ON"),
}


@needs_build
@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_host_paths_in_cpp(host: str, tmp_path: Path) -> None:
    march, sanitize = HOSTS[host]
    if platform.machine() not in ("x86_64", "AMD64"):
        if march != "native":
            pytest.skip("needs an x86-64 machine")
        march = "off"
    options = ("-DGAS_ENGINE_TESTS=ON", f"-DGAS_ENGINE_MARCH={march}", f"-DGAS_ENGINE_SANITIZE={sanitize}")
    for command in ([CMAKE, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options], [CMAKE, "--build", tmp_path]):
        step = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert step.returncode == 0, step.stdout + step.stderr
    run = subprocess.run([tmp_path / "gas_host_tests"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_build
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"CXX": "/bin/false"}, "install a C++20 compiler"),
        ({"GAS_ENGINE_MARCH": "no-such-cpu", "GAS_ENGINE_CUDA": "off"}, "install a C++20 compiler"),
        ({"GAS_ENGINE_CUDA": "maybe"}, "GAS_ENGINE_CUDA must be auto, on or off, got 'maybe'"),
        ({"GAS_ENGINE_NATIVE": "perhaps"}, "GAS_ENGINE_NATIVE must be on or off, got 'perhaps'"),
        ({"GAS_ENGINE_CUDA_ARCHS": "80 newest"}, "GAS_ENGINE_CUDA_ARCHS must list compute capabilities"),
        pytest.param(
            {"GAS_ENGINE_CUDA_ARCHS": "35"},
            "set GAS_ENGINE_CUDA=off for a CPU build",
            marks=pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
        ),
        pytest.param(
            {"NVCC_APPEND_FLAGS": "--no-such-flag"},  # nvcc is there and fails
            "set GAS_ENGINE_CUDA=off for a CPU build",
            marks=pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
        ),
        pytest.param(
            {"GAS_ENGINE_CUDA": "on"},
            "GAS_ENGINE_CUDA=on, but nvcc is not on PATH or in CUDA_HOME",
            marks=pytest.mark.skipif(NVCC is not None, reason="needs a machine without nvcc"),
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_failed_build_ends_in_one_sentence(tree: Path, variables: dict[str, str], sentence: str) -> None:
    run = build(tree, **variables)
    last = run.stdout.strip().splitlines()[-1]
    assert run.returncode != 0
    assert last.startswith("gas_engine: ") and last.endswith(".") and sentence in last, run.stdout[-3000:]
    assert "Traceback" not in run.stdout


def test_pure_python_build(tree: Path) -> None:
    run = build(tree, GAS_ENGINE_NATIVE="off", CXX="/bin/false")
    assert run.returncode == 0, run.stdout
    assert list((tree / "build").rglob("__init__.py")) and not list((tree / "build").rglob("_native*"))


@needs_build
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("cards", "archs"),
    [("9.0\n9.0\n8.6\n7.0\n", "86 90"), ("99.9\n", "75 80 86 89 90 100 120"), ("[N/A]\n", "75 80 86 89 90 100 120")],
    ids=["of the cards", "a card too new", "no card"],
)
def test_kernels_are_for_the_cards_that_are_there(tree: Path, tmp_path: Path, cards: str, archs: str) -> None:
    """Which is a minute of nvcc instead of six."""
    (tmp_path / "said").write_text(cards)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path / 'said'}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    import pybind11

    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]
    path = os.pathsep.join([str(tmp_path), PATH])
    run = subprocess.run(
        [str(CMAKE), "-S", str(tree), "-B", str(tmp_path / "build"), *options],
        env=environment(PATH=path), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ninja = (tmp_path / "build" / "build.ninja").read_text()
    known = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True).stdout
    wanted = {arch for arch in archs.split() if f"compute_{arch}" in known}
    assert {*re.findall(r"code=\[?sm_(\d+)", ninja)} == wanted


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda p: p.name)
def test_kernels_compile_everywhere_without_spills(
    source: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """For every architecture of the default build; the report says how many kernels, registers and spills."""
    listed = re.search(r'EVERY_CUDA_ARCH "([\d;]+)"', (ROOT / "CMakeLists.txt").read_text())
    assert listed
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [a for a in listed.group(1).split(";") if f"compute_{a}" in known]
    exact = ["--fmad=false"] if source.stem == "reversible" else []
    targets = [word for a in archs for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    command = [NVCC, "-std=c++20", "-O3", *exact, *targets, "-Xptxas", "-v", "-fatbin", source, "-o", tmp_path / "out"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        run.stderr,
        re.S,
    )
    assert {arch for _, arch, *_ in kernels} == set(archs), "ptxas reported no kernel for some architecture"
    registers = [int(k[-1]) for k in kernels]
    report = (
        f"{source.name}: {len(kernels)} kernels for sm_{' sm_'.join(archs)}, {min(registers)} to {max(registers)} "
        f"registers, {sum(int(k[3]) + int(k[4]) for k in kernels)} bytes spilled"
    )
    record_property("ptxas", report)
    spilled = [
        f"{name} sm_{arch}: {stores} + {loads}"
        for name, arch, _, stores, loads, _ in kernels
        if stores != "0" or loads != "0"
    ]
    assert not spilled, "\n".join([report, *spilled])
