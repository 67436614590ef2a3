"""A model on a device: batches of pixels → the answer to each image. No Ray here."""

from __future__ import annotations

import os
import threading
from typing import Final, Generic, Literal

import torch
from torch import Tensor, nn

from pipeline.answers import Answer, Kept
from pipeline.errors import WorkerError
from pipeline.models import Model
from pipeline.presets import Normalise

Precision = Literal["fp32", "bf16", "fp16"]

# Set to 1 where Ray was told of GPUs that are not there, as tests do: whoever is given one computes on the CPU.
FAKE_GPUS: Final = "NIGHTSHIFT_FAKE_GPUS"

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# How the allocators of PyTorch 2.11 to 2.15, for the CPU and CUDA, and the libraries below say it.
_OUT_OF_MEMORY: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_DEVICE_LOST: Final = (
    "CUDA error:",
    "device-side assert",
    "illegal memory access",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)


class Predictor(Generic[Kept]):
    """A network that is ready on its device; safe to be called from several threads, one batch at a time."""

    def __init__(
        self, model: Model, answer: Answer[Kept], *, device: str = "cpu", precision: Precision = "fp32"
    ) -> None:
        self.device = open_device(device, precision)
        self.answer = answer
        self._precision = precision
        self._lock = threading.Lock()
        self._network = nn.Sequential(Normalise(model.preset), answer.build(model)).eval()
        self._network.to(self.device).to(memory_format=torch.channels_last)

    def __call__(self, pixels: Tensor) -> Kept:
        """(B, 3, H, W) uint8 → what is kept of each image; what follows the network is in float32 in any case."""
        with self._lock, torch.inference_mode():
            with autocast(self.device, self._precision):
                batch = pixels.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
                outputs = self._network(batch)
            return self.answer.keep(outputs.float())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on whatever device, could not have the memory it asked for: fewer images at once may do."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether CUDA answers this process with errors from now on, whatever it is asked."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _DEVICE_LOST)
    )


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A block in which a network computes in `precision`, as far as that does no harm."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def find_device(num_gpus: float) -> str:
    """Where a worker that holds so many GPUs computes: never on the CPU for want of a driver."""
    return "cuda" if num_gpus and os.environ.get(FAKE_GPUS) != "1" else "cpu"


def open_device(name: str, precision: Precision) -> torch.device:
    """The device, which has to be there and able to compute in `precision`; raises WorkerError else."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise WorkerError("a GPU was assigned to this worker, but PyTorch finds no CUDA device; check the driver")
        if precision == "bf16" and not torch.cuda.is_bf16_supported():
            raise WorkerError(f"{torch.cuda.get_device_name(device)} has no bf16, which this run was planned with")
    elif precision == "fp16":
        raise WorkerError("this run was planned with fp16, which needs a GPU")
    return device
