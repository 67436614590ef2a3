"""A child process that imports torch and torchvision, and computes on every GPU."""

from __future__ import annotations

import ctypes
import time
from typing import Any, Final

from pipeline.diagnosis.child import Teller, answer

# As in `pipeline.cluster`: from here on, GPUs have instructions for bf16.
_BF16_CAPABILITY: Final = (8, 0)
_SIDE: Final = 512


def probe(argument: None, teller: Teller) -> None:
    teller.begin("importing torch")
    began = time.monotonic()
    import torch

    teller.tell(
        torch=torch.__version__,
        cuda_build=torch.version.cuda,
        hip_build=getattr(torch.version, "hip", None),
        import_s=time.monotonic() - began,
    )
    teller.begin("importing torchvision")
    import torchvision

    teller.tell(torchvision=torchvision.__version__, import_s=time.monotonic() - began)
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return
    teller.begin("initialising CUDA")
    teller.tell(driver_cuda=_find_driver_cuda())
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, no GPU, a broken one
        teller.tell(cuda_error=" ".join(str(error).split()))
        return
    teller.tell(has_nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available())
    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        teller.begin(f"computing on GPU {index}")
        gpus.append({"index": index})
        try:
            _look_at_gpu(index, gpus[-1])
        except RuntimeError as error:  # torch's own are: no kernels for it, out of memory, in use by one process only
            gpus[-1]["error"] = " ".join(str(error).split())
        teller.tell(gpus=gpus)


def _look_at_gpu(index: int, gpu: dict[str, Any]) -> None:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    gpu |= {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "has_bf16": capability >= _BF16_CAPABILITY,
        "memory": properties.total_memory,
    }
    free, total = torch.cuda.mem_get_info(index)
    gpu |= {"free": free, "memory": total}
    matrix = torch.ones(_SIDE, _SIDE, device=f"cuda:{index}", dtype=torch.float16)
    product = (matrix @ matrix).float().mean().item()
    if product != _SIDE:
        gpu["error"] = f"computes wrong: the mean of a product of ones is {product}, not {_SIDE}"


def _find_driver_cuda() -> str | None:
    """The newest CUDA that the driver knows, such as `12.8`; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


if __name__ == "__main__":
    answer(probe)
