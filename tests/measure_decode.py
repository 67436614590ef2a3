"""Decode samples in a process of its own, and say what became of each and what it cost, as a JSON line.

`python tests/measure_decode.py MAX_PIXELS all_samples,…` or `… FIRST-LAST` for mutants. The line before a sample names
it, so that one which kills the process is known. The process cannot have more than a few GB in any case.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import corpus

from pipeline.decode import decode
from pipeline.errors import DecodeError

CEILING_BYTES = 6 << 30


def read_samples(what: str) -> Iterator[tuple[str, bytes]]:
    first, dash, last = what.partition("-")
    if dash:
        for seed in range(int(first), int(last)):
            yield f"mutant {seed}", corpus.make_mutant(seed)
    else:
        for group in what.split(","):
            yield from getattr(corpus, group)().items()


def find_peak_kb() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def measure(content: bytes, max_pixels: int) -> dict[str, object]:
    # From here on, the peak is this sample's.
    Path("/proc/self/clear_refs").write_text("5")
    before, began = find_peak_kb(), time.process_time()
    outcome: dict[str, object] = {"bytes": len(content)}
    try:
        picture = decode(content, exif="apply", max_pixels=max_pixels)
        outcome |= {"size": picture.size, "mode": picture.mode}
    except DecodeError as error:
        outcome |= {"kind": error.kind, "error": str(error)}
    except BaseException as error:
        outcome |= {"escaped": repr(error)}
    outcome["seconds"] = time.process_time() - began
    outcome["mb"] = (find_peak_kb() - before) / 1000
    return outcome


def main(max_pixels: int, what: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (CEILING_BYTES, CEILING_BYTES))
    for name, content in read_samples(what):
        print(json.dumps({"name": name}), flush=True)
        print(json.dumps(measure(content, max_pixels)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
