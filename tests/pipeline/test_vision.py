"""What labels starts without PyTorch's compiler, and who wants the compiler has it."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["pipeline.dispatch", "pipeline.picture", "jobs.label"])
def test_what_labels_starts_without_the_compiler(module):
    assert (
        run(f"import sys, {module}; print([name for name in sys.modules if name.startswith('torch._dynamo')])") == "[]"
    )


def test_compiler_is_there_for_who_asks():
    code = (
        "import torch, pipeline.vision as vision\n"
        "assert vision._StandIn('torch._dynamo.utils').is_compile_supported('cpu') is True\n"
        "import torch._dynamo.utils as utils\n"
        "assert vision._StandIn('torch._dynamo.utils').counters is utils.counters\n"
        "assert isinstance(utils, type(torch)) and type(utils) is not vision._StandIn\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.zeros(1)).item())"
    )
    assert run(code) == "1.0"


def test_another_name_than_the_known_one_is_the_module_s_own():
    code = (
        "import sys, torch\n"
        "import pipeline.vision as vision\n"
        "sys.modules['torch._dynamo.utils'] = vision._StandIn('torch._dynamo.utils')\n"
        "from torch._dynamo.utils import counters\n"
        "import torch._dynamo.utils\n"
        "print(counters is torch._dynamo.utils.counters, type(torch._dynamo.utils).__name__)"
    )
    assert run(code) == "True module"
