"""Whether this machine can do the work: its Python, its processor, a compiler.

Each check takes facts, which a `read_…` beside it finds; None stands for what this system does not tell.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.diagnosis.cgroup import CGROUPS, read_limits, read_number
from pipeline.diagnosis.finding import Finding

# What pyproject.toml requires.
PYTHON_VERSIONS: Final = ((3, 11), (3, 14))
# Inductor compiles and loads such a library for each model.
_PROGRAM: Final = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
_BUSY_PER_CORE: Final = 2.0
_COMPILE_TIMEOUT_S: Final = 20.0
_COUNTS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_THREAD_LIMIT")
# With several workers on a machine, each of them would pin its threads to the same cores.
_PINS: Final = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def read_python() -> tuple[tuple[int, int, int], bool]:
    """The version, and whether this is a free-threaded build."""
    return sys.version_info[:3], bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def describe_range() -> str:
    """The versions of Python that nightshift runs on."""
    (major, lowest), (_, beyond) = PYTHON_VERSIONS
    return f"{major}.{lowest} to {major}.{beyond - 1}"


def check_python(version: tuple[int, int, int], is_without_gil: bool) -> Finding:
    lowest, beyond = PYTHON_VERSIONS
    found = ".".join(map(str, version))
    if not lowest <= version[:2] < beyond:
        remedy = f"make an environment with Python {describe_range()}, and install nightshift there"
        found += f", and nightshift needs {describe_range()}"
        return Finding(name="python", state="fault", found=found, remedy=remedy)
    if is_without_gil:
        remedy = f"use the usual build of Python {version[0]}.{version[1]}"
        return Finding(name="python", state="warning", found=f"{found} without GIL, which Ray lacks", remedy=remedy)
    return Finding(name="python", state="ok", found=f"{found} on {platform.system()} {platform.machine()}")


# ---------------------------------------------------------------------------------------------------------------
# Processor


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """How many cores there are, and for whom."""

    installed: int
    usable: int
    """That this process may run on: its affinity."""
    quota: float | None
    """Of its cgroup, in cores."""


def read_cores(cgroups: Path = CGROUPS) -> Cores:
    installed = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else installed
    quotas = []
    for text in read_limits("cpu", "cpu.max", cgroups):
        share, _, period = text.partition(" ")
        if share.isdecimal():
            quotas.append(int(share) / int(period))
    with_v1 = read_number(cgroups / "cpu/cpu.cfs_quota_us"), read_number(cgroups / "cpu/cpu.cfs_period_us")
    if with_v1[0] and with_v1[1]:
        quotas.append(with_v1[0] / with_v1[1])
    return Cores(installed=installed, usable=usable, quota=min(quotas, default=None))


def count_cores(cores: Cores) -> float:
    """How many of them this process has."""
    return min(cores.usable, cores.quota or cores.usable)


def check_cores(cores: Cores) -> Finding:
    """Ray counts what is installed, or the quota of the container, and starts a worker for each."""
    most = count_cores(cores)
    counted = f"{most:g} core{'s' * (most != 1)}"
    if most == cores.installed:
        return Finding(name="cores", state="ok", found=counted)
    why = "its quota" if cores.quota and cores.quota < cores.usable else "its affinity"
    found = f"{counted} of {cores.installed}, by {why}"
    if cores.usable < min(cores.installed, cores.quota or cores.installed):
        return Finding(
            name="cores",
            state="warning",
            found=f"{found}; Ray counts {min(cores.installed, cores.quota or cores.installed):g}",
            remedy=f"give --num-workers {cores.usable} --cpus-per-worker 1, or start Ray with as many CPUs: "
            f"`ray start --head --num-cpus {cores.usable}`, and --address auto",
        )
    return Finding(name="cores", state="ok", found=found)


def check_load(load: float, cores: Cores) -> Finding:
    """Whether this machine is free for a run; `load` is the average of the last minute."""
    most = count_cores(cores)
    found = f"{load:.1f} programs at work on {most:g} core{'s' * (most != 1)} in the last minute"
    if load > most * _BUSY_PER_CORE:
        remedy = "wait, or end what keeps it busy: what took long above and below may be for that alone"
        return Finding(name="load", state="warning", found=found, remedy=remedy)
    return Finding(name="load", state="ok", found=found)


def read_processor_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    except OSError:
        pass
    return None


def check_processor(flags: frozenset[str] | None) -> Finding:
    name = "processor"
    if flags is None:
        return Finding(name=name, state="skipped", found=f"{platform.machine()}; its features are not told here")
    if bf16 := sorted(flags & {"avx512_bf16", "amx_bf16"}):
        found = f"computes in bf16 ({', '.join(bf16)}): without a GPU, --precision auto is bf16"
        return Finding(name=name, state="ok", found=found)
    vectors = next((kind for kind in ("avx512f", "avx2", "sve", "asimd", "avx") if kind in flags), None)
    found = f"{vectors or 'no vectors'}, no instructions for bf16: without a GPU, --precision auto is fp32"
    if vectors in (None, "avx"):
        return Finding(
            name=name,
            state="warning",
            found=found,
            remedy="expect models to be slow on this processor, which has no AVX2; in a virtual machine, "
            "choose a processor type that passes the host's features on",
        )
    return Finding(name=name, state="ok", found=found)


def check_threads(variables: Mapping[str, str], cores: Cores) -> Finding:
    """Workers set their own number of threads, but a wrong value here binds or limits all of them."""
    given = {name: variables[name] for name in (*_COUNTS, *_PINS) if name in variables}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    wrong = [name for name in _COUNTS if name in given and not _are_counts(given[name])]
    large = [name for name in _COUNTS if name in given and name not in wrong and _first(given[name]) > cores.installed]
    pins = [name for name in _PINS if given.get(name, "false").lower() not in ("false", "disabled", "none", "")]
    limits = [name for name in given if name == "OMP_THREAD_LIMIT" and name not in wrong and _first(given[name]) == 1]
    if bad := wrong + large + pins + limits:
        reasons = [
            *(f"{name} is no number" for name in wrong),
            *(f"{name} is more than {cores.installed} cores" for name in large),
            *(f"{name} would pin every worker to the same cores" for name in pins),
            *(f"{name} leaves no more than one" for name in limits),
        ]
        return Finding(
            name="threads",
            state="warning",
            found=f"{shown}: {'; '.join(reasons)}",
            remedy=f"unset {' '.join(bad)}: nightshift gives each worker its share of the cores",
        )
    return Finding(name="threads", state="ok", found=shown or "left to nightshift")


def _are_counts(text: str) -> bool:
    """OpenMP takes a list, for nested regions."""
    return all(part.strip().isdecimal() and int(part) > 0 for part in text.split(","))


def _first(text: str) -> int:
    return int(text.partition(",")[0])


# ---------------------------------------------------------------------------------------------------------------
# A compiler


def read_compiler(variables: Mapping[str, str]) -> tuple[str | None, str]:
    """The path of a C++ compiler, if there is one, and what it complains of when it makes a library; "" if nothing."""
    candidates = [variables["CXX"]] if variables.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        return None, ""
    with tempfile.TemporaryDirectory(prefix="nightshift-doctor-") as folder:
        source = Path(folder, "program.cpp")
        source.write_text(_PROGRAM)
        openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
        command = [compiler, "-shared", "-fPIC", *openmp, f"-I{sysconfig.get_path('include')}"]
        try:
            done = subprocess.run(
                [*command, str(source), "-o", str(source.with_suffix(".so"))],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return compiler, f"no library after {_COMPILE_TIMEOUT_S:.0f} s"
        except OSError as error:
            return compiler, str(error)
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if "error" in line] or lines or [f"exit code {done.returncode}"]
    return compiler, errors[0] if done.returncode else ""


def check_compiler(compiler: str | None, complaint: str) -> Finding:
    name = "compiler"
    if compiler is None:
        return Finding(
            name=name,
            state="warning",
            found="no C++ compiler, which torch.compile needs",
            remedy="install one (`apt install g++`, `dnf install gcc-c++`, `xcode-select --install`), or do without "
            "--compile",
        )
    if not complaint:
        return Finding(name=name, state="ok", found=f"{compiler} makes libraries with OpenMP, for torch.compile")
    if "Python.h" in complaint:
        remedy = "install Python's headers (`apt install python3-dev`, or those of this very Python)"
    elif "omp" in complaint:
        remedy = "install OpenMP for it (`apt install libgomp1 libomp-dev`, `brew install libomp`)"
    else:
        remedy = f"try another compiler: CXX=g++; {compiler} could not make a library"
    return Finding(
        name=name, state="warning", found=f"{compiler} cannot serve torch.compile: {complaint}", remedy=remedy
    )
