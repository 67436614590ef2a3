"""`label` on hosts of their own, between which a cable is pulled: network namespaces with a bridge between them.

pytest tests/jobs/test_label_hosts.py

    head (1 core) ──┐
    worker (1 core) ┼── hub        each with its own network, host name and processes;
    driver (none) ──┘              the file system is the one that they share
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def ip(command: str) -> str:
    return subprocess.run(
        ["ip", *command.split()], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


class Host:
    """Namespaces of network, name and processes, with one cable; and the Ray that runs there."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.ip = f"10.77.0.{number}"
        self._network = network
        self._namespace = f"{network.prefix}-{name}"
        self._port = f"to-{name}"
        self._machine: subprocess.Popen[bytes] | None = None
        self._ray: subprocess.Popen[bytes] | None = None
        network.add_namespace(self._namespace)
        ip(f"link add {self._port} netns {network.hub} type veth peer eth0 netns {self._namespace}")
        ip(f"-n {network.hub} link set {self._port} master bridge up")
        ip(f"-n {self._namespace} addr add {self.ip}/24 dev eth0")
        for interface in ("lo", "eth0"):
            ip(f"-n {self._namespace} link set {interface} up")
        # How Ray finds a host's own address: the one that it would reach the world from.
        ip(f"-n {self._namespace} route add default dev eth0")
        self._switch_on()

    @property
    def prefix(self) -> list[str]:
        """What runs a command on this host."""
        assert self._machine is not None
        (first,) = psutil.Process(self._machine.pid).children()
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        environment.append(f"RAY_TMPDIR={self._network.folder}")
        return ["nsenter", f"--target={first.pid}", "--net", "--uts", "--mount", "--pid", "--wd=.", "env", *environment]

    def start_ray(self, *, num_cpus: int, head: Host | None = None) -> None:
        """Start a node, and return when it has joined."""
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"] if not head else [f"--address={head.address}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={self.ip}"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=150000000", "--disable-usage-stats", "--block"]
        log = self._network.folder / f"{self.name}.log"
        for _ in range(START_ATTEMPTS):
            with log.open("wb") as out:
                self._ray = subprocess.Popen([*self.prefix, *command], stdout=out, stderr=subprocess.STDOUT)
            until(lambda: "Ray runtime started" in log.read_text() or not self._is_running(), log.read_text)
            if self._is_running():
                return
            self.restart()
        raise AssertionError(f"no Ray on {self.name}: {log.read_text()}")

    def _is_running(self) -> bool:
        return self._ray is not None and self._ray.poll() is None

    @property
    def address(self) -> str:
        return f"{self.ip}:{PORT}"

    @property
    def has_ray(self) -> bool:
        names = set()
        for pid in ip(f"netns pids {self._namespace}").split():
            with contextlib.suppress(psutil.NoSuchProcess):
                names.add(psutil.Process(int(pid)).name())
        return "raylet" in names

    def await_loss_of(self, host: Host) -> None:
        """Wait until the Ray whose head is here takes a host for dead."""
        code = f"""
import time
from ray._raylet import GcsClient
client = GcsClient(address={self.address!r})
while {host.ip!r} in [node.node_manager_address for node in client.get_all_node_info().values() if node.state == 0]:
    time.sleep(0.2)
"""
        subprocess.run([*self.prefix, sys.executable, "-c", code], check=True, timeout=PATIENCE_S)

    def pull_cable(self) -> None:
        ip(f"-n {self._network.hub} link set {self._port} down")

    def plug_in(self) -> None:
        ip(f"-n {self._network.hub} link set {self._port} up")

    def restart(self) -> None:
        self.switch_off()
        self._switch_on()

    def switch_off(self) -> None:
        """End all its processes, as the kernel does where the first one of a namespace ends."""
        for process in filter(None, (self._machine, self._ray)):
            process.kill()
            process.wait()
        until(lambda: not ip(f"netns pids {self._namespace}"), lambda: f"{self.name} does not end")

    def _switch_on(self) -> None:
        first = f"hostname {self.name} && echo up && exec sleep infinity"
        apart = ["unshare", "--uts", "--mount-proc", "--pid", "--fork", "--kill-child", "sh", "-c", first]
        self._machine = subprocess.Popen(["ip", "netns", "exec", self._namespace, *apart], stdout=subprocess.PIPE)
        assert self._machine.stdout is not None
        with self._machine.stdout as told:
            assert told.readline() == b"up\n"


class Network:
    """Hosts that hang on one bridge; nothing of it is seen in this machine's own network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"ns{os.getpid()}"
        self.hub = f"{self.prefix}-hub"
        self._namespaces: list[str] = []
        self._hosts: list[Host] = []
        self.add_namespace(self.hub)
        ip(f"-n {self.hub} link add bridge type bridge")
        ip(f"-n {self.hub} link set bridge up")

    def add_namespace(self, name: str) -> None:
        ip(f"netns add {name}")
        self._namespaces.append(name)

    def add(self, name: str) -> Host:
        self._hosts.append(Host(self, name, len(self._hosts) + 1))
        return self._hosts[-1]

    def close(self) -> None:
        for host in self._hosts:
            host.switch_off()
        for name in reversed(self._namespaces):
            ip(f"netns del {name}")


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)} (Debian's packages iproute2 and util-linux)")
    name = f"ns{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], stderr=subprocess.PIPE, text=True)
    if tried.returncode:
        pytest.skip(f"needs network namespaces, which are not permitted here: {tried.stderr.strip()}")
    ip(f"netns del {name}")
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
        job.until(lambda: {record["host"] for record in job.workers.values()} == {"head", "worker"})
        assert not job.parts

        # A moment without network costs nothing but that moment.
        worker.pull_cable()
        time.sleep(BLIP_S)
        worker.plug_in()
        job.go_on()
        job.until(lambda: len(job.parts) >= 4)
        assert worker.has_ray

        # Cut off for longer, a host ends what it has begun, unheard; when it is back, there is no place for it.
        pids = {record["host"]: pid for pid, record in job.workers.items()}
        job.hold(*pids.values())
        job.until(lambda: job.held == set(pids.values()))
        before = len(job.parts)
        worker.pull_cable()
        job.go_on(pids["worker"])
        job.until(lambda: len(job.parts) > before)
        head.await_loss_of(worker)
        worker.plug_in()
        job.until(lambda: not worker.has_ray)
        worker.restart()
        worker.start_ray(num_cpus=1, head=head)  # as what watches over a host does
        job.go_on()
        assert_complete(job, images)
    finally:
        job.end()
    account = json.loads((job.output / "run.json").read_text())
    assert account["invocations"][0]["host"] == "driver"
    assert account["cluster"]["num_nodes"] == 2
