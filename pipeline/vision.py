"""torchvision, without the compiler of PyTorch that it would import with it: two seconds of a process's start.

One function of torchvision's asks `torch._dynamo` whether something could be compiled, and imports it for that. Here it
is asked when that function is called, which no classifier does. Who compiles a model imports the compiler then, and
so does who augments images with `torchvision.transforms.v2`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Final

_ASKED: Final = "torch._dynamo.utils"


def _import_torchvision() -> None:
    if _ASKED in sys.modules:
        return
    stand_in = _StandIn(_ASKED)
    sys.modules[_ASKED] = stand_in
    try:
        import torchvision  # noqa: F401
    finally:
        if sys.modules.get(_ASKED) is stand_in:
            del sys.modules[_ASKED]


class _StandIn(ModuleType):
    """Has the one name that torchvision 0.17 to 0.29 asks for; for any other, it gives way to the module itself."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        from torch._dynamo.utils import is_compile_supported

        return bool(is_compile_supported(device_type))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system looks for in every module
            raise AttributeError(name)
        if sys.modules.get(_ASKED) is self:
            del sys.modules[_ASKED]
        import torch._dynamo.utils

        return getattr(torch._dynamo.utils, name)


_import_torchvision()

from torchvision import models as zoo  # noqa: E402
from torchvision.transforms import InterpolationMode, functional  # noqa: E402

__all__ = ["InterpolationMode", "functional", "zoo"]
