"""`label` on hosts of their own, between which a cable is pulled: network namespaces with a bridge between them.

pytest tests/jobs/test_label_hosts.py

    head (1 core) ──┐
    worker (1 core) ┼── hub        each with its own network, host name and temporary folder;
    driver (none) ──┘              the file system is the one that they share
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
from clusters import NUM_IMAGES, START_ATTEMPTS, Job, assert_complete

pytestmark = pytest.mark.slow

PORT: Final = 6379
PATIENCE_S: Final = 300
# Shorter than what Ray takes for the death of a node.
BLIP_S: Final = 2
ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    # A host that hears nothing of the head for so long gives up.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


class Host:
    """A network namespace with one cable, and the Ray that runs there."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.ip = f"10.77.0.{number}"
        self._namespace = f"{network.prefix}-{name}"
        self._network = network
        self._port = f"to-{name}"
        self._ray: subprocess.Popen[bytes] | None = None
        self.folder = network.folder / name
        self.folder.mkdir()
        network.add_namespace(self._namespace)
        run(
            "ip",
            "link",
            "add",
            self._port,
            "netns",
            network.hub,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            self._namespace,
        )
        run("ip", "-n", network.hub, "link", "set", self._port, "master", "bridge", "up")
        run("ip", "-n", self._namespace, "addr", "add", f"{self.ip}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            run("ip", "-n", self._namespace, "link", "set", interface, "up")

    @property
    def prefix(self) -> list[str]:
        """What runs a command on this host."""
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        renamed = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return [
            "ip", "netns", "exec", self._namespace, *renamed, "env", *environment, f"RAY_TMPDIR={self.folder}"
        ]  # fmt: skip

    def start_ray(self, *, num_cpus: int, head: Host | None = None) -> None:
        """Start a node, and return when it has joined."""
        role = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"] if head is None else [f"--address={head.address}"]
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={self.ip}"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=150000000", "--disable-usage-stats", "--block"]
        log = self.folder / "ray.log"
        for _ in range(START_ATTEMPTS):
            with log.open("wb") as out:
                self._ray = subprocess.Popen([*self.prefix, *command], stdout=out, stderr=subprocess.STDOUT)
            until(lambda: "Ray runtime started" in log.read_text() or self._has_ended(), log.read_text)
            if not self._has_ended():
                return
            self.end_processes()
        raise AssertionError(f"no Ray on {self.name}: {log.read_text()}")

    def _has_ended(self) -> bool:
        return self._ray is not None and self._ray.poll() is not None

    @property
    def address(self) -> str:
        return f"{self.ip}:{PORT}"

    @property
    def has_ray(self) -> bool:
        return self._find_raylet() is not None

    @property
    def raylet(self) -> int:
        """The process to which the workers on this host belong."""
        raylet = self._find_raylet()
        assert raylet is not None
        return raylet

    def pull_cable(self) -> None:
        run("ip", "-n", self._network.hub, "link", "set", self._port, "down")

    def plug_in(self) -> None:
        run("ip", "-n", self._network.hub, "link", "set", self._port, "up")

    def end_processes(self) -> None:
        """All of them, however they are."""
        processes = self._find_processes()
        for process in processes:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if self._ray is not None:
            self._ray.wait(PATIENCE_S)
        psutil.wait_procs(processes, timeout=PATIENCE_S)

    def _find_raylet(self) -> int | None:
        return next((process.pid for process in self._find_processes() if process.name() == "raylet"), None)

    def _find_processes(self) -> list[psutil.Process]:
        found = []
        for pid in run("ip", "netns", "pids", self._namespace).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found


class Network:
    """Hosts that hang on one bridge; nothing of it is seen in this machine's own network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"ns{os.getpid()}"
        self.hub = f"{self.prefix}-hub"
        self._namespaces: list[str] = []
        self._hosts: list[Host] = []
        self.add_namespace(self.hub)
        run("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self.hub, "link", "set", "bridge", "up")

    def add_namespace(self, name: str) -> None:
        run("ip", "netns", "add", name)
        self._namespaces.append(name)

    def add(self, name: str) -> Host:
        self._hosts.append(Host(self, name, len(self._hosts) + 1))
        return self._hosts[-1]

    def close(self) -> None:
        for host in self._hosts:
            host.end_processes()
        for name in reversed(self._namespaces):
            run("ip", "netns", "del", name)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)} (Debian's packages iproute2 and util-linux)")
    name = f"ns{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], stderr=subprocess.PIPE, text=True)
    if tried.returncode:
        pytest.skip(f"needs network namespaces, which are not permitted here: {tried.stderr.strip()}")
    run("ip", "netns", "del", name)
    with tempfile.TemporaryDirectory(prefix="ns-", dir="/tmp") as folder:  # short, for the paths of Ray's sockets
        built = Network(Path(folder))
        try:
            yield built
        finally:
            built.close()


def until(condition: Callable[[], object], describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)


def test_every_image_is_one_row_though_a_host_is_cut_off_for_a_while(network, tmp_path, make_images):
    images, folder = tmp_path / "images", tmp_path / "job"
    make_images(images, NUM_IMAGES)
    folder.mkdir()
    head, worker, driver = (network.add(name) for name in ("head", "worker", "driver"))
    head.start_ray(num_cpus=1)
    worker.start_ray(num_cpus=1, head=head)
    driver.start_ray(num_cpus=0, head=head)

    job = Job(folder, images, head.address, prefix=driver.prefix)
    try:
        # Both are at work, and stop in the middle of a shard.
        job.hold()
        job.until(lambda: len({record["raylet"] for record in job.workers.values()}) == 2)
        assert not job.parts

        # A moment without network costs nothing but that moment.
        worker.pull_cable()
        time.sleep(BLIP_S)
        worker.plug_in()
        job.go_on()
        job.until(lambda: len(job.parts) >= 4)
        assert worker.has_ray

        # Cut off for longer, a host ends what it has begun, of which nobody hears, and gives up.
        job.hold(*(pid for pid, record in job.workers.items() if record["raylet"] != worker.raylet))
        before = len(job.parts)
        worker.pull_cable()
        job.until(lambda: len(job.parts) > before)
        job.until(lambda: not worker.has_ray)
        worker.plug_in()
        worker.end_processes()
        worker.start_ray(num_cpus=1, head=head)  # as what watches over a host does
        job.go_on()
        assert_complete(job, images)
    finally:
        job.end()
    account = json.loads((job.output / "run.json").read_text())
    assert account["invocations"][0]["host"] == "driver"
    assert account["cluster"]["num_nodes"] == 2
