"""`nightshift label` beside the same work without it: by a PyTorch loop, and by Ray Data as it shows it.

python benchmarks/label.py feed PHOTOS                                     a network that costs nothing
python benchmarks/label.py squeezenet1_0 PHOTOS --weights FILE             real weights
python benchmarks/label.py squeezenet1_0 PHOTOS --weights FILE --exact     the same pixels and precision as the others
python benchmarks/label.py feed PHOTOS --peers torch --pairs 1             fewer of them

PHOTOS is a folder of photographs, which are repeated until there are `--images` of them. All contestants run in turn,
`--pairs` times, each in processes of its own; what is compared are medians of images a second once they are at work,
and, beside that, of the seconds from Enter to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import psutil

HERE: Final = Path(__file__).parent
_LOOK_S: Final = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """How one contestant did, once."""

    contestant: str
    images_per_s: float
    """At work, without start-up."""
    seconds: float
    """From Enter to the end."""
    cpu_ms_per_image: float
    """Of all its processes, start-up included."""
    peak_mb: float
    """Of all its processes together, what they share counted once for each."""


class Observer:
    """Adds up what a process and all that it starts take, while the block lasts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.peak_bytes = 0
        self._root = psutil.Process(process.pid)
        self._cpu: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu.values())

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            total = 0
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    times = process.cpu_times()
                    total += process.memory_info().rss
                    self._cpu[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:  # ended meanwhile
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def collect(photos: Path, folder: Path, count: int) -> None:
    """Let there be `count` files in `folder`, copies of those in `photos`."""
    originals = sorted(path for path in photos.iterdir() if path.is_file())
    for number in range(count):
        original = originals[number % len(originals)]
        shutil.copyfile(original, folder / f"{number:06d}{original.suffix.lower()}")


def run_contestant(name: str, options: argparse.Namespace, folder: Path, scratch: Path) -> Figures:
    out = scratch / name
    if name == "nightshift":
        model = "free_net:FreeNet" if options.case == "feed" else options.case
        command = [sys.executable, "-m", "jobs", "label", str(folder), "-o", str(out), "-m", model, "--json", "-q"]
        command += ["--preprocess", "exact", "--precision", "fp32"] if options.exact else []
        command += ["--address", "local"]
    else:
        model = "free" if options.case == "feed" else options.case
        command = [sys.executable, str(HERE / "peers.py"), name, str(folder), str(out), "--model", model]
    command += ["--weights", os.path.abspath(options.weights)] if options.weights else []
    began = perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
    )
    with Observer(process) as observer:
        told, _ = process.communicate()
    seconds = perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}: {' '.join(command)}")
    if name == "nightshift":
        rate = json.loads((out / "run.json").read_text())["throughput"]["images_per_s"]
    else:
        last = json.loads(told.splitlines()[-1])
        rate = last["images"] / last["seconds"]
    return Figures(
        contestant=name,
        images_per_s=rate,
        seconds=seconds,
        cpu_ms_per_image=1000 * observer.cpu_s / options.images,
        peak_mb=observer.peak_bytes / 1e6,
    )


def main() -> None:
    """Run all contestants in turn, and print how they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="feed, or the name of a torchvision classifier")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", help="a file with its weights; else they are random for the peers")
    parser.add_argument("--exact", action="store_true", help="torchvision's pixels to the bit, in fp32")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--peers", default="torch,ray")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args()
    contestants = [*options.peers.split(","), "nightshift"]
    figures: list[Figures] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "photos")
        folder.mkdir()
        collect(options.photos, folder, options.images)
        for number in range(options.pairs):
            for name in contestants:
                scratch = Path(place, f"{name}-{number}")
                scratch.mkdir()
                figures.append(run_contestant(name, options, folder, scratch))
                print(describe(figures[-1]), flush=True)
    ours = find_median(figures, "nightshift")
    print(f"\nmedians of {options.pairs}, {options.case}, {options.images:,} images")
    for name in contestants:
        theirs = find_median(figures, name)
        ratio = "" if name == "nightshift" else f"   nightshift is {ours / theirs:5.2f} x as fast"
        print(f"  {name:<12}{theirs:8.1f} images/s{ratio}")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in figures], indent=1))


def describe(one: Figures) -> str:
    return (
        f"{one.contestant:<12}{one.images_per_s:8.1f} images/s at work  {one.seconds:7.1f} s in all"
        f"  {one.cpu_ms_per_image:7.1f} ms of CPU an image  {one.peak_mb:7,.0f} MB"
    )


def find_median(figures: list[Figures], contestant: str) -> float:
    return statistics.median(one.images_per_s for one in figures if one.contestant == contestant)


if __name__ == "__main__":
    main()
