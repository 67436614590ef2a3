"""How long planning takes, how much memory, and how much disk: `python benchmarks/planning.py [FOLDER]`.

Makes a tree of empty files and a set of tars in FOLDER (by default a temporary one, 2 GB), lists each in a process of
its own, writes the plan as `nightshift label` would, and prints what it took. Ten times as many images should take
ten times as long, and no more memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Final

FILES_PER_FOLDER: Final = 1_000
MEMBERS_PER_TAR: Final = 10_000
MEMBER_BYTES: Final = 400
SIZES: Final = (100_000, 1_000_000)


def make_tree(root: Path, num_files: int) -> None:
    """Empty files, since listing reads none of them."""
    for number in range(num_files):
        folder, name = divmod(number, FILES_PER_FOLDER)
        if name == 0:
            directory = root / f"{folder // 100:03d}" / f"{folder:05d}"
            directory.mkdir(parents=True)
        os.close(os.open(directory / f"IMG_{number:08d}.jpg", os.O_CREAT | os.O_WRONLY))


def make_tars(root: Path, num_members: int) -> None:
    """Members of a few hundred bytes each."""
    root.mkdir()
    data = os.urandom(MEMBER_BYTES).ljust(-(-MEMBER_BYTES // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, b"\0")
    for number in range(0, num_members, MEMBERS_PER_TAR):
        with open(root / f"shard-{number // MEMBERS_PER_TAR:06d}.tar", "wb") as file:
            for member in range(number, number + MEMBERS_PER_TAR):
                header = tarfile.TarInfo(f"{member:09d}.jpg")
                header.size = MEMBER_BYTES
                file.write(header.tobuf(tarfile.USTAR_FORMAT) + data)
            file.write(bytes(2 * tarfile.BLOCKSIZE))


def plan(source: str, output: str) -> None:
    """List and write a plan, and print what it took as JSON."""
    from pipeline.listing import Inputs
    from pipeline.plan import write_listing
    from pipeline.sources import ListingOptions
    from pipeline.storage import LocalFolder

    idle_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    inputs = Inputs((source,), options=ListingOptions())
    listing = write_listing(LocalFolder(output, scratch="tmp"), inputs.list_images())
    seconds = time.monotonic() - began
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_bytes = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
    figures = {
        "images": listing.num_images,
        "seconds": seconds,
        "idle_mib": idle_kib / 1024,
        "peak_mib": peak_kib / 1024,
    }
    print(json.dumps(figures | {"bytes_per_image": num_bytes / listing.num_images}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="where to make the images")
    parser.add_argument("--plan", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        plan(*arguments.plan)
        return
    print(f"{'':<7}{'images':>10}{'seconds':>9}{'images/s':>10}{'idle MiB':>10}{'peak MiB':>10}{'bytes/image':>13}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for kind, make in (("files", make_tree), ("tars", make_tars)):
            for size in SIZES:
                source, output = Path(root, f"{kind}-{size}"), Path(root, f"plan-{kind}-{size}")
                make(source, size)
                command = [sys.executable, __file__, "--plan", str(source), str(output)]
                took = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{kind:<7}{took['images']:>10,}{took['seconds']:>9.1f}{took['images'] / took['seconds']:>10,.0f}"
                    f"{took['idle_mib']:>10.0f}{took['peak_mib']:>10.0f}{took['bytes_per_image']:>13.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
