"""The layers of the design, as far as a linter does not hold them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = "{name.split('.')[0] for name in sys.modules} & {'torch', 'torchvision', 'ray'}"


@pytest.mark.parametrize(
    "module",
    [
        "jobs.__main__",
        "jobs.label",
        "jobs.embed",
        "jobs.evaluate",
        "jobs.report",
        "pipeline.report",
        "pipeline.evaluation",
        "jobs.inspect",
        "jobs.models",
        "jobs.demo",
        "jobs.doctor",
        "pipeline.summary",
        "pipeline.run",
        "pipeline.commit",
    ],
)
def test_commands_start_without_torch_and_ray(module):
    code = f"import sys, {module}; loaded = {HEAVY}; sys.exit(str(loaded) if loaded else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packages_carry_their_types():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["jobs", "pipeline"]
    assert all((root / package / "py.typed").is_file() for package in packages)
