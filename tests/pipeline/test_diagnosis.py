"""The checks of `nightshift doctor`: with facts that this machine has not, and with the machine itself.

pytest tests/pipeline/test_diagnosis.py
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.diagnosis import child, cluster, files, gpu, libraries, machine, memory, place
from pipeline.diagnosis.child import Report, ask
from pipeline.diagnosis.finding import Check, Finding, examine
from pipeline.diagnosis.probes.place import find_file_system
from pipeline.errors import ClusterError
from pipeline.jobserver import Site
from pipeline.storage import open_folder

ROOT = Path(__file__).parents[2]
GB = 10**9


def test_checks_are_told_in_their_order_and_run_at_the_same_time():
    both = threading.Barrier(2)

    def meet(name):
        both.wait(10)
        return Finding(name=name, state="ok", found="met")

    findings = examine([Check("first", lambda: meet("first")), Check("second", lambda: [meet("second")])])
    assert [(finding.name, finding.found) for finding in findings] == [("first", "met"), ("second", "met")]


def test_secrets_are_masked():
    finding = Finding(name="x", state="ok", found="http://me:pass1@h:1", details="s3://key:pass2@bucket/x")
    (masked,) = examine([Check("x", lambda: finding)])
    assert "pass1" not in masked.found and "pass2" not in masked.details


def test_heavy_checks_do_not_run_at_the_same_time():
    busy = threading.Lock()

    def look():
        with_lock = busy.acquire(blocking=False)
        time.sleep(0.05)  # for the other, if it were there
        busy.release()
        return Finding(name="heavy", state="ok" if with_lock else "fault", found="")

    findings = examine([Check("one", look, is_heavy=True), Check("other", look, is_heavy=True)])
    assert [finding.state for finding in findings] == ["ok", "ok"]


def test_check_that_raises_is_a_finding_that_names_the_place_and_hides_no_other():
    def crash():
        raise ZeroDivisionError("of this test")

    crashed, fine = examine([Check("odd", crash), Check("even", lambda: Finding(name="even", state="ok", found=""))])
    assert (crashed.name, crashed.state, fine.state) == ("odd", "fault", "ok")
    assert "ZeroDivisionError: of this test" in crashed.found
    assert "test_diagnosis.py, line" in crashed.remedy
    assert "Traceback" in crashed.details


def test_check_that_needs_a_missing_library_says_which():
    def crash():
        import nowhere_to_be_found  # noqa: F401

    (finding,) = examine([Check("odd", crash)])
    assert finding.found == "cannot be checked without nowhere_to_be_found, which is not installed"


def test_check_that_hangs_is_given_up():
    for_ever = threading.Event()
    began = time.monotonic()

    def hang():
        for_ever.wait(60)
        return []

    (finding,) = examine([Check("disk", hang, timeout_s=0.1)])
    assert time.monotonic() - began < 30
    assert (finding.name, finding.state, finding.found) == ("disk", "fault", "no answer within 0 s")
    for_ever.set()


# ---------------------------------------------------------------------------------------------------------------
# Child processes


@pytest.fixture
def make_probe(tmp_path, monkeypatch):
    """A function that makes the body of a function `probe(argument, teller)` a probe, and returns its name."""
    package = tmp_path / "probes_of_tests"
    package.mkdir()
    monkeypatch.setattr(child, "_PACKAGE", package.name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(*body):
        lines = "".join(f"    {line}\n" for line in body)
        (package / "asked.py").write_text(
            f"import os, sys, time\nfrom pipeline.diagnosis.child import answer\n"
            f"def probe(argument, teller):\n{lines}\nanswer(probe)\n"
        )
        return "asked"

    return make


def test_child_tells_its_facts_and_takes_an_argument(make_probe):
    probe = make_probe("print('noise')", "teller.tell(a=1, b=argument)", "teller.tell(a=2)")
    assert ask(probe, ["x"], silence_s=60) == Report(facts={"a": 2, "b": ["x"]}, step="starting")


def test_child_that_is_killed_leaves_what_it_told_and_where_it_was(make_probe):
    probe = make_probe("teller.tell(a=1)", "teller.begin('computing')", "os.kill(os.getpid(), 11)")
    report = ask(probe, None, silence_s=60)
    assert report.facts == {"a": 1}
    assert report.trouble == "the process was ended by SIGSEGV while computing"


def test_child_that_exits_early_is_told_with_its_last_words(make_probe):
    report = ask(make_probe("print('the last words')", "sys.stdout.flush()", "os._exit(7)"), None, silence_s=60)
    assert report.trouble == "the process ended with exit code 7 while starting: the last words"


def test_child_that_raises_is_told_with_its_error(make_probe):
    report = ask(make_probe("raise RuntimeError('one\\ntwo')"), None, silence_s=60)
    assert report.trouble == "RuntimeError: one two"
    assert "Traceback" in report.details
    missing = ask(make_probe("import nowhere_to_be_found"), None, silence_s=60)
    assert missing.missing == "nowhere_to_be_found"


def wait_for_end(pid):
    """Until a process that is nobody's child here is gone, or dead and waiting for whoever has to notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


def test_child_that_hangs_is_killed_with_what_it_started(make_probe):
    probe = make_probe(
        "import subprocess",
        "sleeper = subprocess.Popen(['sleep', '600'])",
        "teller.tell(pids=[os.getpid(), sleeper.pid])",
        "teller.begin('sleeping')",
        "time.sleep(600)",
    )
    report = ask(probe, None, silence_s=10)
    assert report.trouble == "no answer for 10 s while sleeping"
    for pid in report.facts["pids"]:
        wait_for_end(pid)


def test_child_ends_with_a_parent_that_is_killed(make_probe, tmp_path):
    probe = make_probe("open(argument, 'w').write(str(os.getpid()))", "time.sleep(600)")
    told = tmp_path / "pid"
    code = (
        f"from pipeline.diagnosis import child; child._PACKAGE = 'probes_of_tests'; "
        f"child.ask({probe!r}, {str(told)!r}, silence_s=600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not told.exists() or not told.read_text():
        assert parent.poll() is None
        time.sleep(0.05)  # a file of another process: there is no event to wait for
    parent.kill()
    parent.wait()
    wait_for_end(int(told.read_text()))


def test_file_in_the_current_folder_does_not_stand_in_for_a_library(make_probe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("yaml.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setenv("PYTHONPATH", "")
    package = tmp_path / "elsewhere/probes_of_tests"
    package.mkdir(parents=True)
    make_probe("import yaml", "teller.tell(yaml=yaml.__version__)")
    (tmp_path / "probes_of_tests/asked.py").rename(package / "asked.py")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    assert ask("asked", None, silence_s=60).trouble is None


# ---------------------------------------------------------------------------------------------------------------
# This machine


def test_every_check_of_this_machine_is_made_without_a_fault():
    findings = [
        machine.check_python(*machine.read_python()),
        libraries.check_requirements(libraries.read_requirements(), libraries.read_version),
        libraries.check_decoders(*libraries.read_decoders()),
        machine.check_cores(machine.read_cores()),
        machine.check_processor(machine.read_processor_flags()),
        machine.check_threads(os.environ, machine.read_cores()),
        memory.check_memory(memory.read_memory()),
        memory.check_shared_memory(memory.read_shared_memory(), memory.read_memory()),
        files.check_open_files(*files.read_open_files()),
        files.check_temporary_folder(files.read_temporary_folder(os.environ)),
        machine.check_compiler(*machine.read_compiler(os.environ)),
        place.check_credentials(place.read_credentials(os.environ)),
    ]
    assert [finding for finding in findings if finding.state == "fault"] == []
    assert all((finding.remedy is not None) == (finding.state == "warning") for finding in findings)


def test_python_versions_are_those_of_the_project():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    lowest, beyond = machine.PYTHON_VERSIONS
    assert required == f">={lowest[0]}.{lowest[1]},<{beyond[0]}.{beyond[1]}"


@pytest.mark.parametrize(
    ("version", "is_without_gil", "state"),
    [
        ((3, 11, 0), False, "ok"),
        ((3, 13, 9), False, "ok"),
        ((3, 13, 9), True, "warning"),
        ((3, 10, 14), False, "fault"),
        ((3, 14, 0), False, "fault"),
    ],
)
def test_python_that_nightshift_does_not_run_on_is_a_fault(version, is_without_gil, state):
    finding = machine.check_python(version, is_without_gil)
    assert finding.state == state
    assert ".".join(map(str, version)) in finding.found


@pytest.mark.parametrize(
    ("cores", "state", "found"),
    [
        ((8, 8, None), "ok", "8 cores"),
        ((1, 1, None), "ok", "1 core"),
        ((64, 64, 4.0), "ok", "4 cores of 64, by its quota"),
        ((64, 4, None), "warning", "4 cores of 64, by its affinity; Ray counts 64"),
        ((64, 4, 16.0), "warning", "4 cores of 64, by its affinity; Ray counts 16"),
    ],
)
def test_cores_that_ray_would_count_too_many_of_are_a_warning(cores, state, found):
    installed, usable, quota = cores
    finding = machine.check_cores(machine.Cores(installed=installed, usable=usable, quota=quota))
    assert (finding.state, finding.found) == (state, found)


def test_affinity_of_this_process_is_seen():
    before = os.sched_getaffinity(0)
    if len(before) == 1:
        pytest.skip("needs two cores")
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.check_cores(machine.read_cores()).state == "warning"
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("load", "state"), [(0.0, "ok"), (9.0, "ok"), (40.0, "warning")])
def test_machine_that_is_busy_already_is_a_warning(load, state):
    assert machine.check_load(load, machine.Cores(installed=8, usable=8, quota=None)).state == state


@pytest.mark.parametrize(
    ("flags", "state", "word"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "ok", "--precision auto is bf16"),
        ({"avx2", "amx_bf16"}, "ok", "amx_bf16"),
        ({"avx", "avx2", "avx512f"}, "ok", "avx512f, no instructions for bf16"),
        ({"asimd", "bf16"}, "ok", "asimd"),
        ({"avx"}, "warning", "avx, no instructions"),
        ({"sse4_2"}, "warning", "no vectors"),
        (None, "skipped", "not told"),
    ],
)
def test_processor_says_what_precision_it_would_compute_in(flags, state, word):
    finding = machine.check_processor(None if flags is None else frozenset(flags))
    assert finding.state == state
    assert word in finding.found


def test_processor_says_bf16_where_workers_find_it(tmp_path):
    """`auto` of a worker's precision reads the same file."""
    from pipeline.cluster import _probe_precision

    flags = machine.read_processor_flags()
    expected = _probe_precision(False)
    assert flags is not None
    assert f"--precision auto is {expected}" in machine.check_processor(flags).found


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "4,2", "OMP_PROC_BIND": "false"}, None),
        ({"OMP_NUM_THREADS": "auto"}, "OMP_NUM_THREADS is no number"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is no number"),
        ({"MKL_NUM_THREADS": "64"}, "MKL_NUM_THREADS is more than 8 cores"),
        ({"OMP_PROC_BIND": "close"}, "OMP_PROC_BIND would pin every worker to the same cores"),
        ({"GOMP_CPU_AFFINITY": "0-3"}, "GOMP_CPU_AFFINITY would pin every worker to the same cores"),
        ({"OMP_THREAD_LIMIT": "1"}, "OMP_THREAD_LIMIT leaves no more than one"),
    ],
)
def test_variables_that_bind_the_threads_of_all_workers_are_a_warning(variables, reason):
    finding = machine.check_threads({**variables, "PATH": "/bin"}, machine.Cores(installed=8, usable=8, quota=None))
    assert finding.state == ("warning" if reason else "ok")
    assert (reason or next(iter(variables))) in finding.found
    if reason:
        assert finding.remedy.startswith(f"unset {next(iter(variables))}:")


@pytest.mark.parametrize(
    ("facts", "state", "word"),
    [
        ((64 * GB, 60 * GB, None, None), "ok", "64.0 GB, of which 60.0 GB are free"),
        ((64 * GB, 60 * GB, 16 * GB, 16 * GB), "ok", "16.0 GB, a limit of the cgroup"),
        ((64 * GB, 60 * GB, 16 * GB, None), "warning", "Ray counts 64.0 GB"),
        ((64 * GB, 60 * GB, 16 * GB, 32 * GB), "warning", "Ray counts 32.0 GB"),
        ((64 * GB, 1 * GB, None, None), "warning", "1.0 GB are free"),
    ],
)
def test_memory_limit_that_ray_does_not_see_is_a_warning(facts, state, word):
    total, available, limit, seen = facts
    finding = memory.check_memory(memory.Memory(total=total, available=available, limit=limit, limit_ray_sees=seen))
    assert finding.state == state
    assert word in finding.found


def test_limits_are_read_from_the_group_and_those_around_it(tmp_path, monkeypatch):
    """A job of a batch system: the limit is two levels above the process, and none at the root, where Ray looks."""
    own = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::") or ":memory:" in line
    )
    (tmp_path / own.lstrip("/")).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(Path, "read_text", _with_file("/proc/self/cgroup", "0::/slurm/job_7/step_0\n", Path.read_text))
    group = tmp_path / "slurm/job_7/step_0"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("2000000000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    (group / "cpu.max").write_text("max 100000\n")
    found = memory.read_memory(tmp_path)
    assert (found.limit, found.limit_ray_sees) == (2 * GB, None)
    assert machine.read_cores(tmp_path).quota == 1.5
    (tmp_path / "memory.max").write_text("1000000000\n")
    found = memory.read_memory(tmp_path)
    assert (found.limit, found.limit_ray_sees) == (1 * GB, 1 * GB)


def _with_file(name, content, otherwise):
    return lambda path, *arguments, **options: content if str(path) == name else otherwise(path, *arguments, **options)


@pytest.mark.parametrize(
    ("size", "free", "total", "state"),
    [
        (32 * GB, 32 * GB, 64 * GB, "ok"),
        (64 << 20, 64 << 20, 64 * GB, "warning"),  # a container's default
        (32 * GB, 1 * GB, 64 * GB, "warning"),  # full of somebody's files
        (128 * GB, 128 * GB, 2_000 * GB, "ok"),  # Ray takes what there is, above 10 GB
    ],
)
def test_shared_memory_is_compared_with_the_object_store(size, free, total, state):
    amount = memory.Memory(total=total, available=total, limit=None, limit_ray_sees=None)
    finding = memory.check_shared_memory(memory.SharedMemory(size=size, free=free), amount)
    assert finding.state == state
    if state == "warning":
        assert "--shm-size=" in finding.remedy


def test_object_store_is_estimated_as_ray_resolves_it():
    from ray._private.utils import get_shared_memory_bytes, resolve_object_store_memory

    store = resolve_object_store_memory(memory.read_memory().total)
    finding = memory.check_shared_memory(memory.read_shared_memory(), memory.read_memory())
    assert (finding.state == "ok") == (get_shared_memory_bytes() >= store)
    assert memory.format_bytes(store) in finding.found


@pytest.mark.parametrize(
    ("soft", "hard", "state"),
    [(1024, 524288, "ok"), (1024, 4096, "warning"), (float("inf"), float("inf"), "ok")],
)
def test_open_files_are_what_ray_can_raise_them_to(soft, hard, state):
    assert files.check_open_files(soft, hard).state == state


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, "ok", "50.0 GB free"),
        ({"free": 4 * GB}, "fault", "more than 95% full"),
        ({"size": 10 * GB, "free": 2 * GB}, "warning", "2.0 GB free"),
        ({"is_writable": False}, "fault", "cannot be written"),
        ({"size": 0, "free": 0}, "fault", "is no folder"),
        ({"path": "/scratch/" + "x" * 60}, "fault", "too long for the names of Ray's sockets"),
    ],
)
def test_temporary_folder_has_room_and_a_short_name(change, state, word):
    folder = files.TemporaryFolder(path="/tmp", size=100 * GB, free=50 * GB, is_writable=True)
    finding = files.check_temporary_folder(replace(folder, **change))
    assert finding.state == state
    assert word in finding.found


def test_temporary_folder_is_the_one_that_ray_uses(tmp_path, monkeypatch):
    from ray._common.utils import get_default_system_temp_dir

    for variables in ({}, {"TMPDIR": str(tmp_path)}, {"TMPDIR": "/nowhere", "RAY_TMPDIR": str(tmp_path)}):
        for name in ("TMPDIR", "RAY_TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert files.read_temporary_folder(os.environ).path == get_default_system_temp_dir()


def test_compiler_that_is_missing_or_broken_is_a_warning(tmp_path):
    missing = machine.check_compiler(*machine.read_compiler({"CXX": "no-such-compiler"}))
    assert (missing.state, missing.found) == ("warning", "no C++ compiler, which torch.compile needs")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    finding = machine.check_compiler(*machine.read_compiler({"CXX": str(broken)}))
    assert finding.state == "warning"
    assert "Python.h" in finding.found
    assert "python3-dev" in finding.remedy


@pytest.mark.parametrize(
    ("requirements", "versions", "state", "word"),
    [
        (["numpy>=2.1", "ray[data]<3,>=2.5"], {"numpy": "2.4", "ray": "2.60.0"}, "ok", "all 2"),
        (["numpy>=2.1", "ray[data]<3,>=2.5"], {"numpy": "2.4"}, "fault", "not installed: ray"),
        (["numpy>=2.1"], {"numpy": "1.26.4"}, "fault", "numpy 1.26.4 (needs >=2.1)"),
        (["scikit-learn; extra == 'demo'", "x; python_version < '3'"], {}, "ok", "all 0"),
        (["torch>=2.11"], {"torch": "2.15.0+cu132"}, "ok", "all 1"),
        (["torch>=2.11"], {"torch": "2.16.0.dev20261101"}, "ok", "all 1"),
        (None, {}, "skipped", "is not installed"),
    ],
)
def test_libraries_that_are_missing_or_do_not_fit_are_told_at_once(requirements, versions, state, word):
    finding = libraries.check_requirements(requirements, versions.get)
    assert finding.state == state
    assert word in finding.found
    if state == "fault":
        assert finding.remedy.startswith("pip install '")


@pytest.mark.parametrize(
    ("lacking", "has_turbo", "state", "word"),
    [
        ((), True, "ok", "with libjpeg-turbo: JPEG, PNG, WEBP"),
        ((), False, "warning", "without libjpeg-turbo"),
        (("AVIF", "WEBP"), True, "warning", "cannot decode WEBP, AVIF: such images would become failed rows"),
        (("JPEG", "AVIF"), True, "fault", "cannot decode JPEG"),
    ],
)
def test_decoders_that_pillow_lacks_are_named(lacking, has_turbo, state, word):
    decoded = {format_: format_ not in lacking for format_ in ("JPEG", "PNG", "WEBP", "AVIF")}
    finding = libraries.check_decoders("13.0.0", decoded, has_turbo)
    assert finding.state == state
    assert word in finding.found


# ---------------------------------------------------------------------------------------------------------------
# PyTorch and GPUs

NO_DRIVER = gpu.Driver(version=None, is_on_bus=False, visible=None)
DRIVER = gpu.Driver(version="550.54.15", is_on_bus=True, visible=None)
TORCH = {"torch": "2.15.0", "torchvision": "0.29.2", "import_s": 3.0, "cuda_build": "13.2", "hip_build": None}
H100 = {"index": 0, "name": "NVIDIA H100", "capability": "9.0", "has_bf16": True, "memory": 80 * GB, "free": 79 * GB}


@pytest.mark.parametrize(
    ("report", "state", "word"),
    [
        (Report(facts=TORCH), "ok", "2.15.0 with torchvision 0.29.2, imported in 3.0 s"),
        (Report(facts={**TORCH, "import_s": 50.0}), "warning", "imported in 50.0 s"),
        (Report(facts={}, missing="torch", trouble="x"), "fault", "torch is not installed"),
        (
            Report(facts={"torch": "2.15.0"}, missing="torchvision", trouble="x"),
            "fault",
            "torchvision is not installed",
        ),
        (
            Report(facts={}, trouble="no answer for 120 s", is_late=True),
            "fault",
            "cannot be imported: no answer for 120 s",
        ),
        (Report(facts={}, trouble="OSError: libcudart.so"), "fault", "cannot be imported: OSError: libcudart.so"),
        (
            Report(facts={"torch": "2.15.0"}, trouble="RuntimeError: operator torchvision::nms does not exist"),
            "fault",
            "torchvision cannot be imported beside torch 2.15.0: RuntimeError: operator torchvision::nms",
        ),
    ],
)
def test_torch_that_cannot_be_imported_is_a_fault_with_its_reason(report, state, word):
    finding = gpu.check_torch(report)
    assert finding.state == state
    assert word in finding.found


@pytest.mark.parametrize(
    ("facts", "driver", "state", "word"),
    [
        ({"gpus": [H100], "driver_cuda": "13.2"}, DRIVER, "ok", "CUDA 13.2 on driver 550.54.15 (knows CUDA 13.2)"),
        ({"gpus": [H100, H100], "has_nccl": False}, DRIVER, "warning", "without NCCL"),
        ({"gpus": [H100, H100], "has_nccl": True}, DRIVER, "ok", "CUDA 13.2"),
        ({"cuda_error": "RuntimeError: driver too old (found 11040)"}, DRIVER, "fault", "driver too old"),
        ({"cuda_error": "no driver"}, NO_DRIVER, "skipped", "no GPU here"),
        ({"cuda_error": "no driver"}, replace(NO_DRIVER, is_on_bus=True), "warning", "and no driver"),
        (
            {"cuda_error": "No CUDA GPUs"},
            replace(DRIVER, visible=""),
            "warning",
            "CUDA_VISIBLE_DEVICES='' leaves no GPU",
        ),
        ({"cuda_build": None}, NO_DRIVER, "skipped", "no GPU here"),
        ({"cuda_build": None}, DRIVER, "fault", "built without CUDA"),
        ({"cuda_build": None, "hip_build": "7.0", "gpus": [H100]}, NO_DRIVER, "ok", "ROCm 7.0"),
    ],
)
def test_gpus_that_torch_does_not_reach_are_told_with_the_reason(facts, driver, state, word):
    finding = gpu.check_cuda(Report(facts={**TORCH, **facts}), driver)
    assert finding.state == state
    assert word in finding.found


def test_cuda_that_takes_the_process_along_is_a_fault():
    report = Report(facts=TORCH, trouble="the process was ended by SIGSEGV while initialising CUDA")
    finding = gpu.check_cuda(report, DRIVER)
    assert finding.state == "fault"
    assert "SIGSEGV while initialising CUDA" in finding.found


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, "ok", "compute capability 9.0 (bf16), 79.0 GB of 80.0 GB free"),
        ({"has_bf16": False, "capability": "7.5"}, "ok", "no bf16, so --precision auto is fp32"),
        ({"free": 20 * GB}, "warning", "other processes hold the rest"),
        ({"error": "no kernel image is available"}, "fault", "NVIDIA H100: no kernel image is available"),
    ],
)
def test_gpu_is_described_and_one_that_does_not_compute_is_a_fault(change, state, word):
    finding = gpu.check_gpu({**H100, **change})
    assert (finding.name, finding.state) == ("gpu 0", state)
    assert word in finding.found


def test_few_cores_for_a_gpu_are_a_warning_with_the_way_out():
    assert gpu.check_cores_per_gpu(64, 8, where="here").state == "ok"
    finding = gpu.check_cores_per_gpu(16, 8, where="here")
    assert (finding.state, finding.found.partition(":")[0]) == ("warning", "2 here, 16 for 8")
    assert "--decode-on cpu-nodes" in finding.remedy


def test_driver_is_read_where_the_kernel_tells_of_it(tmp_path):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    told = tmp_path / "proc/driver/nvidia/version"
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\nGCC version\n")
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    assert gpu.read_driver({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path) == gpu.Driver(
        version="570.86.10", is_on_bus=True, visible="0"
    )
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    (device / "class").write_text("0x040300\n")  # its sound
    assert gpu.read_driver({}, tmp_path) == gpu.Driver(version="550.54.15", is_on_bus=False, visible=None)
    assert gpu.read_driver({}, tmp_path / "nowhere") == NO_DRIVER


# ---------------------------------------------------------------------------------------------------------------
# Clusters

OWN = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0", "torchvision": "0.29.2", "pyarrow": "26", "pillow": "13"}
NODE = {"host": "a", "address": "10.0.0.1", "cpus": 16.0, "gpus": 1.0, "versions": OWN, "unseen": [], "skew_s": 0.0}
HERE = cluster.Target(address=None, way="here", source="this machine")
THERE = cluster.Target(address="10.0.0.1:6379", way="driver", source="RAY_ADDRESS")


@pytest.mark.parametrize(
    ("address", "variables", "expected"),
    [
        (None, {}, [(None, "here")]),
        ("auto", {}, [("auto", "here")]),
        ("h:6379", {"RAY_ADDRESS": "x:1"}, [("h:6379", "driver")]),
        ("ray://h:10001", {}, [("ray://h:10001", "driver")]),
        ("http://h:8265", {}, [("http://h:8265", "jobs")]),
        (None, {"RAY_ADDRESS": "h:6379"}, [("h:6379", "driver")]),
        (None, {"RAY_ADDRESS": "", "RAY_API_SERVER_ADDRESS": "http://h"}, [("http://h", "jobs"), (None, "here")]),
        (None, {"RAY_ADDRESS": "h:1", "RAY_API_SERVER_ADDRESS": "http://h"}, [("h:1", "driver"), ("http://h", "jobs")]),
    ],
)
def test_cluster_that_is_asked_is_the_one_that_commands_would_use(address, variables, expected):
    assert [(target.address, target.way) for target in cluster.find_targets(address, variables)] == expected


def test_refusal_says_what_to_do_and_where_the_address_comes_from():
    finding = cluster.describe_refusal("cluster", THERE, ClusterError("no Ray cluster answers at 10.0.0.1:6379"))
    assert finding.found == "no Ray cluster answers at 10.0.0.1:6379 (RAY_ADDRESS)"
    assert "ssh -L" in finding.remedy
    finding = cluster.describe_refusal("jobs", THERE, ClusterError("it asks for a token: put it there"))
    assert (finding.found, finding.remedy) == ("it asks for a token (RAY_ADDRESS)", "put it there")


def test_ray_that_is_not_installed_is_a_fault_with_the_command():
    finding = cluster.check_ray(Report(facts={}, missing="ray", trouble="x"))
    assert (finding.state, finding.remedy) == ("fault", "pip install 'ray[data,train]'")


@pytest.mark.parametrize(
    ("facts", "trouble", "target", "state", "found", "remedy"),
    [
        (
            {"connect_s": 3.0, "is_own": True, "nodes": [NODE]},
            None,
            HERE,
            "ok",
            "started on this machine in 3.0 s: 1 no",
            "",
        ),
        (
            {"connect_s": 3.0, "nodes": [NODE, NODE]},
            None,
            THERE,
            "ok",
            "at 10.0.0.1:6379 in 3.0 s: 2 nodes, 32 CPUs",
            "",
        ),
        ({}, "Exception: timed out during startup", HERE, "fault", "cannot start a Ray on this machine: ", "30 s"),
        ({}, "RuntimeError: Version mismatch: x", THERE, "fault", "cannot reach the Ray at 10.0.0.1", "same"),
        ({}, "AuthenticationError: Forbidden", THERE, "fault", "cannot reach the Ray at 10.0.0.1", "~/.ray/auth_token"),
        ({"connect_s": 1.0}, "no answer within 9 s", THERE, "fault", "cannot work with the Ray at", "ray status"),
        (
            {"connect_s": 1.0, "nodes": [{**NODE, "versions": None, "error": "late"} | {}]},
            None,
            THERE,
            "ok",
            "1 node",
            "",
        ),
    ],
)
def test_cluster_is_described_or_told_with_the_reason(facts, trouble, target, state, found, remedy):
    finding = cluster.check_cluster(Report(facts=facts, trouble=trouble), target)
    assert finding.state == state
    assert found in finding.found
    assert remedy in (finding.remedy or "")


def states_of(nodes):
    return {finding.name: finding.state for finding in cluster.check_nodes(nodes, OWN)}


def test_nodes_that_are_like_this_machine_are_fine():
    assert states_of([{**NODE, "gpus": 0.0}]) == {}
    assert states_of([NODE, NODE]) == {"node versions": "ok", "clocks": "ok", "cores per GPU": "ok"}


def test_node_that_runs_no_task_is_a_fault():
    silent = {key: NODE[key] for key in ("host", "address", "cpus", "gpus")} | {"error": "a task did not end"}
    assert states_of([NODE, silent])["nodes"] == "fault"
    assert cluster.check_cluster(Report(facts={"connect_s": 1.0, "nodes": [silent]}), THERE).state == "fault"


def test_versions_that_differ_are_a_warning_and_missing_ones_a_fault():
    older, bare = {**NODE, "versions": {**OWN, "torch": "2.14.0"}}, {**NODE, "versions": {**OWN, "torch": None}}
    assert states_of([NODE, older])["node versions"] == "warning"
    assert states_of([NODE, older, bare])["node versions"] == "fault"


@pytest.mark.parametrize(("skew_s", "state"), [(0.5, "ok"), (-20.0, "warning"), (90.0, "fault")])
def test_clock_that_a_lease_could_not_trust_is_told(skew_s, state):
    assert states_of([NODE, {**NODE, "skew_s": skew_s}])["clocks"] == state


def test_output_that_a_node_does_not_see_is_a_fault():
    assert states_of([NODE, {**NODE, "unseen": ["/data"]}])["output"] == "fault"


def test_cluster_with_nodes_that_can_decode_is_told_to_use_them():
    starved, decoder = {**NODE, "cpus": 4.0, "gpus": 4.0}, {**NODE, "cpus": 32.0, "gpus": 0.0}
    (finding,) = [f for f in cluster.check_nodes([starved, decoder], OWN) if f.name == "cores per GPU"]
    assert (finding.state, finding.remedy.partition(":")[0]) == ("warning", "give --decode-on cpu-nodes")


SITE = Site(
    ray_version="2.60.0", python_version="3.11.7", nodes=({"CPU": 16.0, "GPU": 1.0},), is_here=False, can_grow=False
)


@pytest.mark.parametrize(
    ("change", "states"),
    [
        ({}, ["ok", "ok"]),
        ({"nodes": ({"CPU": 4.0},)}, ["ok"]),
        ({"nodes": ({"CPU": 4.0, "GPU": 4.0}, {"CPU": 64.0})}, ["ok", "warning"]),
        ({"ray_version": "2.59.0"}, ["warning", "ok"]),
        ({"python_version": "3.10.2"}, ["fault", "ok"]),
        ({"python_version": None}, ["ok", "ok"]),
    ],
)
def test_cluster_that_jobs_are_submitted_to_fits(change, states):
    target = cluster.Target(address="http://h:8265", way="jobs", source="--address")
    findings = cluster.check_jobs(target, replace(SITE, **change), "2.60.0", has_token=True)
    assert [finding.state for finding in findings] == states


# ---------------------------------------------------------------------------------------------------------------
# Places


def test_output_that_does_not_exist_yet_is_tried_above_it_and_left_as_it_was(tmp_path):
    (finding,) = place.look_at_place(str(tmp_path / "a/b"), is_output=True)
    assert finding.state == "ok" or "ends with" in finding.found
    assert "free" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = place.look_at_place(str(tmp_path / "file"), is_output=True)
    assert (finding.state, finding.remedy) == ("fault", "name a folder")
    (finding,) = place.look_at_place("/proc/nightshift", is_output=True)
    assert finding.state == "fault"
    assert "refused while making a folder" in finding.found


def test_input_is_only_read(tmp_path, make_images):
    (image,) = make_images(tmp_path, 1)
    assert place.look_at_place(image, is_output=False)[0].found.startswith(f"{image}: a file, read in")
    assert place.look_at_place(str(tmp_path), is_output=False)[0].state == "ok"
    missing = place.look_at_place(str(tmp_path / "nowhere"), is_output=False)[0]
    assert (missing.state, missing.found) == ("fault", f"{tmp_path / 'nowhere'}: nothing is there")


FOLDER = {
    "file_system": "ext4",
    "existing": "/data",
    "is_folder": True,
    "free": 50 * GB,
    "size": 100 * GB,
    "has_inodes": True,
    "is_exclusive": True,
    "lock": "yes",
    "seconds": 0.1,
}


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, "ok", "written, renamed, locked and removed in 0.1 s"),
        ({"file_system": "nfs4"}, "ok", "nfs4"),
        (
            {"file_system": "nfs", "lock": "No locks available"},
            "warning",
            "(of the network); locks: No locks available",
        ),
        ({"lock": "no"}, "warning", "locks: no"),
        ({"is_exclusive": False}, "warning", "two processes can create the same file"),
        ({"file_system": "fuse.gcsfuse"}, "warning", "a bucket behind a file system"),
        ({"file_system": "overlay"}, "warning", "ends with the container"),
        ({"free": GB // 2}, "warning", "500.0 MB free"),
        ({"has_inodes": False}, "warning", "hardly an inode"),
        ({"is_folder": False}, "fault", "/data is a file"),
    ],
)
def test_output_is_told_what_its_file_system_lacks(change, state, word):
    report = Report(facts={**FOLDER, **change})
    finding = place.check_place("/data/out", report, is_output=True, is_bucket=False)
    assert finding.state == state
    assert word in finding.found


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_full_disk_is_a_fault_with_the_remedy(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("may not mount")
    try:
        assert find_file_system(tmp_path) == "tmpfs"
        (finding,) = place.look_at_place(str(tmp_path), is_output=True)
        assert finding.state == "fault"
        assert "No space left on device" in finding.found
        assert finding.remedy.startswith("free some space")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_bucket_is_written_and_read_and_stays_an_empty_output(bucket):
    (finding,) = place.look_at_place(f"s3://{bucket}/runs/1", is_output=True)
    assert finding.state == "ok", finding
    assert "listed, written, read and deleted" in finding.found
    assert open_folder(f"s3://{bucket}/runs/1", scratch="_").is_empty()


@pytest.mark.parametrize(
    ("rule", "is_output", "step", "remedy"),
    [
        ({}, True, "listing it", "the credentials are known but lack rights"),
        ({"method": "PUT"}, True, "writing an object", "the credentials are known but lack rights"),
        ({}, False, "looking for it", "the credentials are known but lack rights"),
    ],
)
def test_bucket_that_refuses_says_at_what_and_what_it_needs(faulty_s3, bucket, rule, is_output, step, remedy):
    from faults import DENIED

    faulty_s3.answer(403, DENIED, **rule)
    (finding,) = place.look_at_place(f"s3://{bucket}/runs", is_output=is_output)
    assert finding.state == "fault"
    assert f"refused while {step}" in finding.found
    assert remedy in finding.remedy


def test_bucket_that_nobody_serves_is_a_fault_with_the_remedy(bucket, monkeypatch):
    (missing,) = place.look_at_place(f"s3://{bucket}-other/runs", is_output=True)
    assert (missing.state, missing.remedy) == ("fault", "correct the bucket's name, or create it")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    (dead,) = place.look_at_place(f"s3://{bucket}/runs", is_output=True)
    assert dead.remedy == "see to AWS_ENDPOINT_URL, DNS, proxy and firewall: nobody answers there"
    (unknown,) = place.look_at_place("foo://x/y", is_output=True)
    assert "Protocol not known: foo" in unknown.found


def test_bucket_that_does_not_answer_is_given_up(faulty_s3, bucket, monkeypatch):
    monkeypatch.setattr(place, "SILENCE_S", 12.0)
    faulty_s3.stall()
    (finding,) = place.look_at_place(f"s3://{bucket}/runs", is_output=True)
    assert (finding.state, finding.found) == ("fault", f"s3://{bucket}/runs: no answer for 12 s while listing it")


PROFILES = "[default]\naws_access_key_id=a\naws_secret_access_key=b\n[empty]\nregion=eu-west-1\n"


@pytest.mark.parametrize(
    ("variables", "state", "word"),
    [
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "ok", "keys in the environment"),
        ({"AWS_ACCESS_KEY_ID": "a"}, "fault", "AWS_SECRET_ACCESS_KEY is not"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "x"}, "ok", "a role, by AWS_WEB_IDENTITY_TOKEN_FILE"),
        ({"AWS_ENDPOINT_URL": "http://minio:9000"}, "ok", "profile 'default'; endpoint http://minio:9000"),
        ({"AWS_PROFILE": "night"}, "fault", "AWS_PROFILE is 'night', which AWS's files do not have; known: default"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}, "skipped", "no credentials"),
    ],
)
def test_credentials_are_found_where_s3_looks_for_them(variables, state, word, tmp_path):
    (tmp_path / "credentials").write_text(PROFILES)
    base = {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    finding = place.check_credentials(place.read_credentials({**base, **variables}))
    assert finding.state == state
    assert word in finding.found
    assert "'b'" not in repr(place.read_credentials({**base, **variables}))
