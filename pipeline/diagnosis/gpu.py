"""Whether PyTorch works, and with every GPU that is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.diagnosis.child import Report, ask
from pipeline.diagnosis.finding import Finding
from pipeline.terminal import format_bytes

# Some GB of libraries to read, over the network perhaps.
_SILENCE_S: Final = 120.0
# Every worker imports it, too.
_SLOW_IMPORT_S: Final = 30.0
# PyTorch's own context takes some hundred MB of it.
_FREE_SHARE: Final = 0.75
# A core decodes and resizes some hundred photographs a second, a GPU labels some thousand.
MIN_CORES_PER_GPU: Final = 8
_HURRY: Final = (
    "end what keeps this machine or its disk busy, or put the environment on a disk of its own: every worker imports "
    "PyTorch when it starts"
)
_SELECTOR: Final = "https://pytorch.org/get-started/locally/"
_NVIDIA: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """What the system knows of NVIDIA's GPUs without PyTorch."""

    version: str | None
    """Of the kernel's driver; None where it is not loaded."""
    is_on_bus: bool
    """Whether such a GPU is plugged in, driver or not."""
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""


def read_driver(variables: Mapping[str, str], root: Path = Path("/")) -> Driver:
    version = None
    try:
        line = (root / "proc/driver/nvidia/version").read_text().splitlines()[0]
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar …; open ones say so in between.
        version = next(word for word in line.split() if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        pass
    devices = list((root / "sys/bus/pci/devices").glob("*"))
    on_bus = any(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY_CLASS) for device in devices
    )
    return Driver(version=version, is_on_bus=on_bus, visible=variables.get("CUDA_VISIBLE_DEVICES"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def look_at_torch(driver: Driver, num_cores: float) -> list[Finding]:
    """Ask a child process, and judge."""
    report = ask("torch_gpus", None, silence_s=_SILENCE_S)
    gpus = report.facts.get("gpus", [])
    findings = [check_torch(report), check_cuda(report, driver), *map(check_gpu, gpus)]
    return findings + ([check_cores_per_gpu(num_cores, len(gpus), where="here")] if gpus else [])


def check_torch(report: Report) -> Finding:
    """Whether torch and torchvision can be imported, together."""
    name = "torch"
    facts = report.facts
    if report.missing in ("torch", "torchvision"):
        return Finding(
            name=name,
            state="fault",
            found=f"{report.missing} is not installed",
            remedy=f"pip install torch torchvision ({_SELECTOR} knows the command for other GPUs than CUDA's)",
        )
    if "torchvision" not in facts:
        remedy = "install it anew: pip install --force-reinstall torch torchvision"
        if "torch" in facts:
            remedy = f"install versions that belong together, with one command and from one index ({_SELECTOR})"
        if report.is_late:
            remedy = _HURRY
        found = f"cannot be imported: {report.trouble}"
        if "torch" in facts:
            found = f"torchvision cannot be imported beside torch {facts['torch']}: {report.trouble}"
        return Finding(name=name, state="fault", found=found, remedy=remedy, details=report.details)
    found = f"{facts['torch']} with torchvision {facts['torchvision']}, imported in {facts['import_s']:.1f} s"
    if facts["import_s"] > _SLOW_IMPORT_S:
        return Finding(
            name=name,
            state="warning",
            found=found,
            remedy=_HURRY,
        )
    return Finding(name=name, state="ok", found=found)


def check_cuda(report: Report, driver: Driver) -> Finding:
    """Whether PyTorch and the driver come together."""
    name = "cuda"
    facts = report.facts
    if "torchvision" not in facts:
        return Finding(name=name, state="skipped", found="asked through torch, which cannot be imported")
    built = next(
        (f"{kind} {facts[key]}" for kind, key in (("CUDA", "cuda_build"), ("ROCm", "hip_build")) if facts[key]), ""
    )
    if not built:
        if driver.version or driver.is_on_bus:
            found = f"torch {facts['torch']} is built without CUDA, and there is an NVIDIA GPU here"
            remedy = f"install the build for CUDA ({_SELECTOR})"
            return Finding(name=name, state="fault", found=found, remedy=remedy)
        found = "no GPU here, and torch is built for none: models run on the processor"
        return Finding(name=name, state="skipped", found=found)
    if facts.get("gpus"):
        knows = f" (knows CUDA {facts['driver_cuda']})" if facts.get("driver_cuda") else ""
        on = f" on driver {driver.version}{knows}" if driver.version else ""
        nccl = "" if facts.get("has_nccl") or len(facts["gpus"]) == 1 else "; without NCCL"
        if nccl:
            remedy = f"install a build with NCCL, which training on several GPUs needs ({_SELECTOR})"
            return Finding(name=name, state="warning", found=f"{built}{on}{nccl}", remedy=remedy)
        return Finding(name=name, state="ok", found=f"{built}{on}")
    reason = facts.get("cuda_error") or report.trouble or "no GPU is visible"
    if driver.visible is not None and (driver.version or facts.get("driver_cuda")):
        found = f"CUDA_VISIBLE_DEVICES={driver.visible!r} leaves no GPU: {reason}"
        return Finding(name=name, state="warning", found=found, remedy="unset CUDA_VISIBLE_DEVICES, or name GPUs in it")
    if driver.version or facts.get("driver_cuda"):
        return Finding(
            name=name,
            state="fault",
            found=f"{built} on driver {driver.version or 'unknown'}: {reason}",
            remedy=f"if the driver is too old, install a newer one or a torch for an older CUDA ({_SELECTOR}); else "
            "look at `nvidia-smi` and `dmesg`",
            details=report.details,
        )
    if driver.is_on_bus:
        return Finding(
            name=name,
            state="warning",
            found="there is an NVIDIA GPU here, and no driver",
            remedy="install NVIDIA's driver; in a container, start it with `--gpus all`",
        )
    return Finding(
        name=name, state="skipped", found=f"no GPU here (torch is built for {built}): models run on the processor"
    )


def check_gpu(gpu: Mapping[str, Any]) -> Finding:
    """One GPU, on which something was computed."""
    name = f"gpu {gpu['index']}"
    if "error" in gpu:
        return Finding(
            name=name,
            state="fault",
            found=f"{gpu.get('name', 'unknown')}: {gpu['error']}",
            remedy="look at `nvidia-smi` and `dmesg`; if torch has no kernels for it, install a torch that is built "
            f"for it ({_SELECTOR}); or leave it out with CUDA_VISIBLE_DEVICES",
        )
    precision = "bf16" if gpu["has_bf16"] else "no bf16, so --precision auto is fp32"
    free, memory = gpu["free"], gpu["memory"]
    found = f"{gpu['name']}, compute capability {gpu['capability']} ({precision})"
    found += f", {format_bytes(free)} of {format_bytes(memory)} free"
    if free < memory * _FREE_SHARE:
        return Finding(
            name=name,
            state="warning",
            found=f"{found}: other processes hold the rest",
            remedy="end them (`nvidia-smi` lists them), or give a smaller --batch-size",
        )
    return Finding(name=name, state="ok", found=found)


def check_cores_per_gpu(num_cores: float, num_gpus: float, *, where: str) -> Finding:
    """Whether decoding can keep up."""
    each = num_cores / num_gpus
    found = f"{each:g} {where}, {num_cores:g} for {num_gpus:g}"
    if each >= MIN_CORES_PER_GPU:
        return Finding(name="cores per GPU", state="ok", found=found)
    return Finding(
        name="cores per GPU",
        state="warning",
        found=f"{found}: decoding will keep the GPU waiting, with small models above all",
        remedy=f"take a machine with {MIN_CORES_PER_GPU} or more for each GPU, or add nodes without GPUs to the "
        "cluster and give --decode-on cpu-nodes",
    )
