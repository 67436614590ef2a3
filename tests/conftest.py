"""What tests share: one Ray for the whole session, a tiny model, and small images that they make themselves."""

from __future__ import annotations

import os

# Before PyTorch is imported: on few and busy cores, its threads wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared" / "data"

CATEGORIES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray on this machine that every test which needs one uses; jobs in this process find it and leave it running."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory that a run can label with: 10 classes, 32 x 32 pixels, random weights."""
    import torch
    from torchvision import models as zoo

    from pipeline.model_dir import write_model_dir
    from pipeline.presets import Preset

    arguments = {"width_mult": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = zoo.mobilenet_v2(num_classes=len(CATEGORIES), **arguments).eval()
        network.classifier[1].weight.data.mul_(300)  # so that its scores differ from image to image
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_dir(
        str(path),
        architecture="mobilenet_v2",
        arguments=arguments,
        state=network.state_dict(),
        categories=CATEGORIES,
        preset=Preset(resize=40, crop=32),
        readme="Random weights, for tests.\n",
    )
    return str(path)


@pytest.fixture(scope="session")
def make_images():
    """A function that writes `count` different JPEGs into a folder and returns their paths in the order of listing."""

    def make(folder: Path, count: int, *, seed: int = 0) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        paths = [folder / f"{number:05d}.jpg" for number in range(count)]
        for path in paths:
            coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            coarse.resize((60, 48)).save(path, quality=90)
        return [os.fspath(path) for path in paths]

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs and weights, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real photographs in {SHARED}, which are not there")
    return SHARED
