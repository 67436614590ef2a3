"""What a run over an archive has left behind: for Python, and in the words of a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.run import RUN
from pipeline.storage import as_filesystem, normalise
from pipeline.terminal import format_seconds

if TYPE_CHECKING:
    import pyarrow.dataset

    from jobs.archive import ArchiveConfig


@dataclass(frozen=True, kw_only=True)
class ArchiveResult:
    """Where the rows of a run are, and how it went."""

    directory: ClassVar[str]

    output: str
    """The folder of the run, as it was given."""
    account: dict[str, Any]
    """The content of run.json."""
    exit_code: int
    """0, or 3 where more images failed than --max-failure-rate allows: then all rows are there, and no _SUCCESS."""

    @property
    def parts(self) -> str:
        """The folder of the Parquet files."""
        return self._locate(self.directory)

    @property
    def run_json(self) -> str:
        """The file with the account of the run."""
        return self._locate(RUN)

    @property
    def counts(self) -> dict[str, int]:
        """Images that are `listed`, those without an error, and those that `failed`."""
        return dict(self.account["counts"])

    @property
    def failures(self) -> dict[str, int]:
        """How many images failed with each type of error, the most frequent one first."""
        return dict(self.account["failures"])

    @property
    def images_per_s(self) -> float | None:
        """Images ÷ seconds from the first worker being ready to the last part, over all invocations; None without."""
        speed: float | None = self.account["throughput"]["images_per_s"]
        return speed

    def dataset(self) -> pyarrow.dataset.Dataset:
        """All rows, one for each image, as a dataset that reads them from disk when they are asked for."""
        import pyarrow.dataset as ds

        filesystem, path = as_filesystem(normalise(self.parts))
        return ds.dataset(path, filesystem=filesystem, format="parquet")

    def _locate(self, name: str) -> str:
        return f"{self.output.rstrip('/')}/{name}"


def describe_result(result: ArchiveResult, config: ArchiveConfig) -> list[str]:
    """How the run went, in lines for a person."""
    counts, throughput = result.counts, result.account["throughput"]
    took = format_seconds(throughput["seconds"])
    speed = f", {throughput['images_per_s']:,} images/s" if throughput["images_per_s"] else ""
    lines = [f"{counts[config.outcome]:,} of {counts['listed']:,} images {config.outcome} in {took}{speed}"]
    lines += _describe_toll(result.account["invocations"][-1])
    lines += [f"{number:>7,} failed: {kind}" for kind, number in result.failures.items()]
    if verified := result.account.get("verified"):
        lines.append(f"verified {verified['parts']:,} parts: {verified['rows']:,} rows, one for each image of the plan")
    if result.exit_code:
        rate = counts["failed"] / counts["listed"]
        lines.append(
            f"{rate:.1%} failed, and --max-failure-rate is {config.max_failure_rate:.1%}: no _SUCCESS is written; "
            f"the same command with a higher limit accepts the result"
        )
    return lines


def _describe_toll(invocation: dict[str, Any]) -> list[str]:
    """What this invocation had to put right, if anything."""
    replaced, careful = invocation.get("workers_replaced", 0), invocation.get("shards_done_with_care", {})
    if not replaced and not careful:
        return []
    return [
        f"workers that died and were replaced: {replaced:,}; shards that were then done with care: {len(careful):,}"
    ]
