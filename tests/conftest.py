"""What tests share: one Ray for the whole session, a tiny model, and small images that they make themselves."""

from __future__ import annotations

import os

# Before PyTorch is imported: on few and busy cores, its threads wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray starts, whose workers inherit it: what a client of the tests' own S3 needs, and good for no other.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

import http.client
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import urllib3
from faults import FaultyProxy
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

    from pipeline.model_dir import compose_model_dir, write_model_dir
    from pipeline.presets import Preset

    arguments = {"width_mult": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = zoo.mobilenet_v2(num_classes=len(CATEGORIES), **arguments).eval()
        network.classifier[1].weight.data.mul_(300)  # so that its scores differ from image to image
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_dir(
        str(path),
        compose_model_dir(
            architecture="mobilenet_v2",
            arguments=arguments,
            state=network.state_dict(),
            categories=CATEGORIES,
            preset=Preset(resize=40, crop=32),
            readme="Random weights, for tests.\n",
        ),
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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 on this machine that takes any credentials."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a new bucket in the tests' own S3, which this process finds behind `s3://`."""
    from pipeline.storage.bucket import open_bucket

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex}"
    assert urllib3.request("PUT", f"{s3_server}/{name}", headers={"x-amz-acl": "public-read"}).status == 200
    open_bucket.cache_clear()
    yield name
    open_bucket.cache_clear()


@pytest.fixture
def put_object(s3_server: str, bucket: str) -> Callable[[str, bytes], None]:
    """A function that puts an object under any key, those that pyarrow and others would resolve included."""

    def put(key: str, content: bytes = b"") -> None:
        connection = http.client.HTTPConnection(s3_server.removeprefix("http://"))
        connection.request("PUT", f"/{bucket}/{quote(key)}", content, {"x-amz-acl": "public-read"})
        assert connection.getresponse().status == 200
        connection.close()

    return put


@pytest.fixture
def faulty_s3(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What this process finds behind `s3://` instead: the same S3, which fails as it is told to."""
    from pipeline.storage.bucket import open_bucket

    upstream = urllib3.util.parse_url(s3_server)
    proxy = FaultyProxy((upstream.host, upstream.port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    open_bucket.cache_clear()
    yield proxy
    proxy.close()
