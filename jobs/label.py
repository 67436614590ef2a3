"""Label every image of an archive with the top k classes of a pretrained model.

nightshift label cat.jpg dog.png                                  a picture or two, on the terminal
nightshift label photos/ -o labels/ --model resnet50              an archive, on this machine
nightshift label photos/ -o labels/ --address 10.0.0.1:6379       an archive, on a Ray cluster

inputs ─ list ─ plan ─ shards ═ Ray Data ═ worker: fetch → decode → predict → commit ═ status rows ─ run.json
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

import psutil
import tyro

from jobs.archive import SHARED_IDENTITY, ArchiveConfig, run_archive
from jobs.cli import leave, parse, run_command
from jobs.forecast import describe_forecast
from jobs.inputs import Check
from jobs.pictures import show
from pipeline.commit import PREDICTIONS_DIR
from pipeline.errors import ConfigError
from pipeline.storage import as_filesystem, normalise
from pipeline.terminal import format_seconds, quote_for_shell, quote_for_sql

if TYPE_CHECKING:
    import pyarrow.dataset

    from pipeline.models import Model
    from pipeline.worker import Task

# What a row takes in a part of 600 photographs with ImageNet classes, compressed.
BYTES_PER_ROW: Final = 40
BYTES_PER_PREDICTION: Final = 10


@dataclass(frozen=True, kw_only=True)
class LabelConfig(ArchiveConfig):
    """Settings of a labelling job: its Python API, its YAML file and its flags."""

    job: ClassVar[str] = "label"
    yields: ClassVar[str] = "labels"

    # Labels
    labels: str | None = None
    """A file with the categories, one a line, in place of the model's own."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5
    """How many classes of each image are kept."""

    def open_model(self) -> Model:
        model = self.load_model(labels=self.labels)
        if self.top_k > model.num_classes:
            raise ConfigError(f"--top-k {self.top_k}: model {self.model!r} has {model.num_classes} classes")
        return model

    def make_task(self, **shared: Any) -> Task:
        from pipeline.worker import Task

        return Task(top_k=self.top_k, **shared)

    @property
    def identity_names(self) -> list[str]:
        return ["labels", "top_k", *SHARED_IDENTITY]

    @property
    def bytes_per_row(self) -> float:
        return BYTES_PER_ROW + BYTES_PER_PREDICTION * self.top_k

    def _find_faults(self) -> Iterator[Check]:
        yield self.top_k < 1, f"--top-k {self.top_k}: must be at least 1"
        yield (
            self.labels is not None and not os.path.isfile(self.labels),
            f"--labels {self.labels}: there is no such file",
        )
        yield from super()._find_faults()


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """What a run left behind, and how it went."""

    output: str
    """The folder of the run."""
    account: dict[str, Any]
    """The content of run.json."""
    exit_code: int
    """0, or 3 where more images failed than --max-failure-rate allows."""

    @property
    def predictions(self) -> str:
        """The folder of the parts."""
        return f"{self.output.rstrip('/')}/{PREDICTIONS_DIR}"

    def dataset(self) -> pyarrow.dataset.Dataset:
        """All rows, as a dataset that reads them from disk when they are asked for."""
        import pyarrow.dataset as ds

        filesystem, path = as_filesystem(normalise(self.predictions))
        return ds.dataset(path, filesystem=filesystem, format="parquet")


def run(config: LabelConfig, *, started: float | None = None) -> LabelResult:
    """Label all images of `config.inputs` into `config.output`, or continue where an earlier run ended.

    `started` is when the user asked for it, in seconds since 1970, for the account of the run; by default, now.
    Raises a PipelineError, which carries the exit code, where the command cannot be carried out or the run fails.
    """
    outcome = run_archive(config, started=started)
    return LabelResult(output=str(config.output), account=outcome.account, exit_code=outcome.exit_code)


def describe(result: LabelResult, config: LabelConfig) -> str:
    """The result in the words of a person."""
    counts, throughput = result.account["counts"], result.account["throughput"]
    took = format_seconds(throughput["seconds"])
    speed = f", {throughput['images_per_s']:,} images/s" if throughput["images_per_s"] else ""
    lines = [f"{counts['labelled']:,} of {counts['listed']:,} images labelled in {took}{speed}"]
    lines += _describe_toll(result.account["invocations"][-1])
    lines += [f"{number:>7,} failed: {kind}" for kind, number in result.account["failures"].items()]
    if verified := result.account.get("verified"):
        lines.append(f"verified {verified['parts']:,} parts: {verified['rows']:,} rows, one for each image of the plan")
    if result.exit_code:
        rate = counts["failed"] / counts["listed"]
        lines.append(
            f"{rate:.1%} failed, and --max-failure-rate is {config.max_failure_rate:.1%}: no _SUCCESS is written; "
            f"the same command with a higher limit accepts the result"
        )
    query = f"SELECT label, count(*) FROM {quote_for_sql(result.predictions)} GROUP BY label ORDER BY 2 DESC"
    lines += [
        f"labels   {result.predictions}",
        f"read it  duckdb -c {quote_for_shell(query)}",
    ]
    return "\n".join(lines)


def _describe_toll(invocation: dict[str, Any]) -> list[str]:
    """What this invocation had to put right, if anything."""
    replaced, careful = invocation.get("workers_replaced", 0), invocation.get("shards_done_with_care", {})
    if not replaced and not careful:
        return []
    return [
        f"workers that died and were replaced: {replaced:,}; shards that were then done with care: {len(careful):,}"
    ]


def main(arguments: list[str]) -> int:
    """The command `nightshift label`."""
    purpose = "Label images with the top k classes of a pretrained model: on the terminal, or an archive into Parquet."
    config = parse(LabelConfig, arguments, command="label", description=purpose)
    if config.dry_run:
        config.check()
        print(describe_forecast(config))
        return 0
    if config.output is None:
        return show(config)
    result = run(config, started=psutil.Process().create_time())
    print(jsonlib.dumps(result.account, indent=2) if config.json else describe(result, config))
    return result.exit_code


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
