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
from jobs.inputs import Auto, Check, is_below
from jobs.pictures import show
from jobs.result import ArchiveResult, describe_result
from pipeline.errors import ConfigError
from pipeline.schema import PREDICTION_PARTS, Parts
from pipeline.terminal import quote_for_shell, quote_for_sql

if TYPE_CHECKING:
    from pipeline.answers import BestClasses
    from pipeline.models import Model

AUTO_TOP_K: Final = 5
# What a row takes in a part of 600 photographs with ImageNet classes, compressed.
BYTES_PER_ROW: Final = 40
BYTES_PER_PREDICTION: Final = 10


@dataclass(frozen=True, kw_only=True)
class LabelConfig(ArchiveConfig):
    """Settings of a labelling job: its Python API, its YAML file and its flags."""

    job: ClassVar[str] = "label"
    yields: ClassVar[str] = "labels"
    outcome: ClassVar[str] = PREDICTION_PARTS.outcome
    directory: ClassVar[str] = PREDICTION_PARTS.directory

    # Labels
    labels: str | None = None
    """A file with the categories, one a line, in place of the model's own."""
    top_k: Annotated[int | Auto, tyro.conf.arg(aliases=["-k"])] = "auto"
    """How many classes of each image are kept; auto: five, or all where the model has fewer."""

    def open_model(self) -> Model:
        model = self.load_model(labels=self.labels)
        if self.count_classes(model) > model.num_classes:
            raise ConfigError(f"--top-k {self.top_k}: model {self.model!r} has {model.num_classes} classes")
        return model

    def count_classes(self, model: Model) -> int:
        """How many classes of each image are kept."""
        return min(AUTO_TOP_K, model.num_classes) if self.top_k == "auto" else self.top_k

    def open_answer(self, model: Model) -> BestClasses:
        from pipeline.answers import BestClasses

        return BestClasses(self.count_classes(model))

    def describe_model(self, model: Model, answer: BestClasses) -> dict[str, Any]:
        return model.describe()

    def resolve(self, model: Model) -> dict[str, Any]:
        return {"top_k": self.count_classes(model)}

    def describe_parts(self, resolved: dict[str, Any]) -> Parts:
        return PREDICTION_PARTS

    def count_bytes(self) -> float:
        return BYTES_PER_ROW + BYTES_PER_PREDICTION * (AUTO_TOP_K if self.top_k == "auto" else self.top_k)

    @property
    def identity_names(self) -> list[str]:
        return ["labels", "top_k", *SHARED_IDENTITY]

    def _find_faults(self) -> Iterator[Check]:
        yield is_below(self.top_k, 1), f"--top-k {self.top_k}: must be at least 1"
        yield (
            self.labels is not None and not os.path.isfile(self.labels),
            f"--labels {self.labels}: there is no such file",
        )
        yield from super()._find_faults()


@dataclass(frozen=True, kw_only=True)
class LabelResult(ArchiveResult):
    """Where the labels of a run are, and how it went.

    The rows of `dataset()` have the columns uri, label, label_id, score, predictions (the top k, best first), width and
    height in pixels, size_bytes, target, error_stage, error, attempts, model and run_id. Of an image that failed,
    `error` says why, and label, label_id, score and predictions are null.
    """

    directory: ClassVar[str] = PREDICTION_PARTS.directory

    @property
    def predictions(self) -> str:
        """The folder of the parts."""
        return self.parts


def run(config: LabelConfig, *, started: float | None = None) -> LabelResult:
    """Label all images of `config.inputs` into `config.output`, or continue where an earlier run ended.

    It runs on the Ray that this process is connected to, or else on the one at `config.address`, or one of its own.

    Args:
        config: the settings; `output` has to be among them.
        started: when the user asked for it, in seconds since 1970, for the account of the run; by default, now.

    Raises:
        UsageError: the command cannot be carried out; `faults` has all the reasons, and nothing was started.
        ClusterError: no Ray can be reached or started.
        PipelineError: the run failed, or was stopped; what was committed is kept, and the same call goes on.
    """
    outcome = run_archive(config, started=started)
    return LabelResult(output=str(config.output), account=outcome.account, exit_code=outcome.exit_code)


def describe(result: LabelResult, config: LabelConfig) -> str:
    """The result in the words of a person."""
    query = f"SELECT label, count(*) FROM {quote_for_sql(result.predictions)} GROUP BY label ORDER BY 2 DESC"
    lines = [
        *describe_result(result, config),
        f"labels   {result.predictions}",
        f"read it  duckdb -c {quote_for_shell(query)}",
    ]
    return "\n".join(lines)


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
