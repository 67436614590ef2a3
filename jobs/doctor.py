"""Say whether this machine and the cluster are fit for a run, and what to do where they are not.

nightshift doctor                                       this machine, and Ray on it
nightshift doctor labels/ --address 10.0.0.5:6379       a cluster, and an output that its nodes have to see
nightshift doctor s3://bucket/labels --input s3://photos   buckets: to write into, and to read from
"""

from __future__ import annotations

import json as jsonlib
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Final, TextIO

import tyro

from jobs.cli import leave, parse, run_command
from pipeline.diagnosis import cluster, files, gpu, libraries, machine, memory, place
from pipeline.diagnosis.finding import CHILD_TIMEOUT_S, Check, Finding, State, examine
from pipeline.terminal import Progress, escape_controls

_MARKS: Final[dict[State, str]] = {"ok": "✓", "warning": "!", "fault": "✗", "skipped": "-"}
_COLOURS: Final[dict[State, str]] = {"ok": "32", "warning": "33", "fault": "31", "skipped": "2"}
# Where the encoding of the output lacks them.
_ASCII_MARKS: Final[dict[State, str]] = {"ok": "+", "warning": "!", "fault": "x", "skipped": "-"}
_MIN_COLUMNS: Final = 60
_USUAL_COLUMNS: Final = 120


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Settings of the examination."""

    places: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PLACE...]")] = ()
    """Outputs to try, folders or buckets: something is written there, read and removed again."""
    input: tuple[str, ...] = ()
    """A place that only has to be readable; may be given several times."""
    address: str | None = None
    """The cluster: `host:6379`, `ray://host:10001`, or `http://host:8265` for jobs (default: RAY_ADDRESS and
    RAY_API_SERVER_ADDRESS, else a Ray on this machine)."""
    json: bool = False
    """Print one JSON document."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Also how long each check took, and what lies behind its findings."""


def run(config: DoctorConfig) -> list[Finding]:
    """What all checks found, in the order of the table; none of them raises or hangs."""
    with Progress(sys.stderr) as progress:
        return examine(
            list_checks(config, os.environ), on_wait=lambda names: progress.show(f"examining: {', '.join(names)}")
        )


def list_checks(config: DoctorConfig, variables: Mapping[str, str]) -> list[Check]:
    """All that is to be looked at, in the order of the table; facts are read when a check is made, not before."""
    targets = cluster.find_targets(config.address, variables)
    folders = sorted(filter(None, map(place.find_folder, config.places)))
    places = [(given, True) for given in config.places] + [(given, False) for given in config.input]
    return [
        Check("python", lambda: machine.check_python(*machine.read_python())),
        Check("libraries", lambda: libraries.check_requirements(libraries.read_requirements(), libraries.read_version)),
        Check("decoders", lambda: libraries.check_decoders(*libraries.read_decoders())),
        Check("cores", lambda: machine.check_cores(machine.read_cores())),
        Check("load", lambda: machine.check_load(os.getloadavg()[0], machine.read_cores())),
        Check("processor", lambda: machine.check_processor(machine.read_processor_flags())),
        Check("threads", lambda: machine.check_threads(variables, machine.read_cores())),
        Check("memory", lambda: memory.check_memory(memory.read_memory())),
        Check("shared memory", lambda: memory.check_shared_memory(memory.read_shared_memory(), memory.read_memory())),
        Check("open files", lambda: files.check_open_files(*files.read_open_files())),
        Check("temporary files", lambda: files.check_temporary_folder(files.read_temporary_folder(variables))),
        Check("compiler", lambda: machine.check_compiler(*machine.read_compiler(variables))),
        Check(
            "torch",
            lambda: gpu.look_at_torch(gpu.read_driver(variables), machine.count_cores(machine.read_cores())),
            timeout_s=CHILD_TIMEOUT_S,
            is_heavy=True,
        ),
        Check(
            "ray",
            lambda: cluster.look_at_ray(targets, folders),
            timeout_s=CHILD_TIMEOUT_S,
            is_heavy=True,
        ),
        *(
            Check("jobs", partial(cluster.look_at_jobs, target), timeout_s=cluster.JOBS_TIMEOUT_S)
            for target in targets
            if target.way == "jobs"
        ),
        Check("s3", lambda: place.check_credentials(place.read_credentials(variables))),
        *(
            Check(
                "output" if is_output else "input",
                partial(place.look_at_place, given, is_output=is_output),
                timeout_s=CHILD_TIMEOUT_S,
            )
            for given, is_output in places
        ),
    ]


def is_fit(findings: Sequence[Finding]) -> bool:
    """Whether a run would work."""
    return all(finding.state != "fault" for finding in findings)


def describe(findings: Sequence[Finding], stream: TextIO, *, is_verbose: bool) -> str:
    """The table, what to do, and the verdict, for `stream`."""
    marks = _MARKS if (stream.encoding or "").lower().startswith("utf") else _ASCII_MARKS
    has_colours = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    columns = shutil.get_terminal_size().columns if stream.isatty() else _USUAL_COLUMNS
    width = max(len(finding.name) for finding in findings)
    lines = []
    remedies = []
    for finding in findings:
        mark = f"\x1b[{_COLOURS[finding.state]}m{marks[finding.state]}\x1b[0m" if has_colours else marks[finding.state]
        text = escape_controls(finding.found)
        if is_verbose:
            text += f" ({finding.seconds:.1f} s)"
        heading = f"{mark} {finding.name.ljust(width)}  "
        lines += _wrap(text, heading, width + 4, columns, invisible=len(mark) - 1)
        if is_verbose and finding.details:
            lines += [" " * (width + 4) + escape_controls(line) for line in finding.details.rstrip().splitlines()]
        if finding.remedy is not None:
            remedies.append(finding)
    for number, finding in enumerate(remedies, start=1):
        heading = f"{number}. {finding.name}: "
        lines += ["", "what to do"] if number == 1 else []
        lines += _wrap(escape_controls(finding.remedy or ""), heading, 3, columns)
    return "\n".join([*lines, "", describe_verdict(findings)])


def _wrap(text: str, heading: str, indent: int, columns: int, *, invisible: int = 0) -> list[str]:
    """`text` behind its heading, and indented where it goes on; names and commands are not cut.

    The heading has so many characters that are `invisible`.
    """
    gap = " " * (len(heading) - invisible)
    lines = textwrap.wrap(
        text,
        max(columns, _MIN_COLUMNS),
        initial_indent=gap,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    first, *rest = lines or [gap]
    return [heading + first[len(gap) :], *rest]


def describe_verdict(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = Counter(finding.state for finding in findings)
    parts = [f"{count} {word}{'s' * (count != 1)}" for word in ("fault", "warning") if (count := counts[word])]
    verdict = "fit for a run" if is_fit(findings) else "not fit for a run"
    return f"{verdict}: {', '.join(parts)}" if parts else verdict


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """All of it as one document."""
    return {"is_fit": is_fit(findings), "findings": [asdict(finding) for finding in findings]}


def main(arguments: list[str]) -> int:
    """The command `nightshift doctor`."""
    purpose = "Say whether this machine and the cluster are fit for a run, and what to do where they are not."
    config = parse(DoctorConfig, arguments, command="doctor", description=purpose)
    findings = run(config)
    print(
        jsonlib.dumps(to_json(findings), indent=2)
        if config.json
        else describe(findings, sys.stdout, is_verbose=config.verbose)
    )
    return 0 if is_fit(findings) else 1


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
