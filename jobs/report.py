"""Make one page of a run, to look at before its labels are believed: figures, charts, and pictures with their labels.

nightshift report labels/                        labels/report.html
nightshift report s3://bucket/labels/ -o a.html  of a run anywhere, into a file here

run.json, metrics.json, a few row groups ─ thumbnails ─ template ─ report.html
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Final

import tyro

from jobs.cli import leave, parse, run_command
from pipeline.errors import ConfigError, OutputError
from pipeline.run import REPORT, SCRATCH_DIR, explain_folder
from pipeline.storage import Folder, LocalFolder, normalise, open_folder, uri_to_path
from pipeline.terminal import Progress, format_bytes

_HOW_TO_OPEN: Final = "it is one file, and needs no network"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """The output folder of a run of label, evaluate or finetune, on a file system or in a bucket."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file to write; by default report.html in the folder of the run."""
    retries: int = 3
    """How often a request is repeated that failed for a passing reason."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """No progress and no notices."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""

    def check(self) -> None:
        """Raise ConfigError with every fault that can be seen without reading anything."""
        faults = []
        if not self.run:
            faults.append("RUN: name the output folder of a run")
        if self.retries < 0:
            faults.append(f"--retries {self.retries}: must not be negative")
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A page that was written."""

    path: str
    """A path, or a URI."""
    num_bytes: int


def run(config: ReportConfig) -> ReportResult:
    """Compose the page of a run, and write it; raises a PipelineError where there is no run, or no place for it."""
    from pipeline.report import compose_report, read_account

    config.check()
    folder = open_folder(normalise(config.run), scratch=SCRATCH_DIR)
    with explain_folder(folder), Progress(sys.stderr, is_quiet=config.quiet) as progress:
        account = read_account(folder)
        page = compose_report(folder, account, retries=config.retries, tell=progress.show).encode()
        return ReportResult(path=_write(config, folder, page), num_bytes=len(page))


def _write(config: ReportConfig, folder: Folder, page: bytes) -> str:
    if config.output is None:
        folder.put(REPORT, page)
        return folder.locate(REPORT)
    uri = normalise(config.output)
    parent, _, name = uri.rpartition("/")
    place = open_folder(parent or "/", scratch="")
    name = uri_to_path(name)
    if isinstance(place, LocalFolder) and place.path(name).is_dir():
        raise OutputError(f"-o {config.output}: is a folder; name a file, {os.path.join(config.output, REPORT)} say")
    place.put(name, page)
    return place.locate(name)


def describe(result: ReportResult) -> str:
    """What there is to look at."""
    return f"report   {result.path} ({format_bytes(result.num_bytes)}; {_HOW_TO_OPEN})"


def main(arguments: list[str]) -> int:
    """The command `nightshift report`."""
    purpose = "Make one page of a run to look at: report.html, with all that it shows inside it."
    config = parse(ReportConfig, arguments, command="report", description=purpose)
    print(describe(run(config)))
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
