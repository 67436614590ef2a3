"""Say how good labels are: label images whose classes are known, and compare; or compare what a run has left.

nightshift evaluate photos/val -o scores/ --model run/model           labels, then compares with the names of folders
nightshift evaluate labels/ --targets truth.csv                       a finished run, with classes from a table
nightshift evaluate labels/ --targets truth.csv --fail-under 0.90     exit code 1 below that accuracy, for CI

inputs ─ label, where they are not labelled yet ─ parts ─ targets ─ figures ─ metrics.json
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import psutil

from jobs import label
from jobs.cli import leave, parse, run_command
from jobs.forecast import describe_forecast
from jobs.inputs import Check
from jobs.label import LabelConfig
from pipeline.errors import OutputError
from pipeline.run import METRICS, explain_folder, open_run_folder
from pipeline.secrets import mask
from pipeline.storage import Folder
from pipeline.terminal import Progress, escape_controls, quote_for_shell

# What goes with a run that is labelled already.
_OF_A_RUN: Final = "inputs targets target_column fail_under retries json quiet verbose".split()
_SHOWN: Final = 3
EXIT_NOT_GOOD_ENOUGH: Final = 1


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LabelConfig):
    """Settings of an evaluation: those of the labelling that comes first, and where the true classes are."""

    target: Literal["none", "folder", "column"] = "folder"
    """Where the true label of an image comes from, unless --targets names a file: the name of its `folder`, or a
    `column` that tables must have; labels that archives and tables carry go first in any case."""

    # Evaluation
    targets: str | None = None
    """A CSV, TSV, JSON-lines or Parquet file with the true classes; its rows name images by full URI, by path below an
    INPUT, or by base name."""
    target_column: str | None = None
    """Its column with the classes: integers are their numbers, texts their names; else label_name, label, target, or
    the only other one."""
    fail_under: float | None = None
    """End with exit code 1 where less than this share of the images has its true class as its label."""

    @property
    def is_of_a_run(self) -> bool:
        """Whether INPUT is a finished run: nothing is to be labelled, since there is no place for it."""
        return self.output is None

    def _find_faults(self) -> Iterator[Check]:
        if self.is_of_a_run:
            yield len(self.inputs) != 1, "-o: name a folder for the labels, or give one finished run in place of INPUT"
            for field in fields(self):
                is_given = getattr(self, field.name) != field.default
                flag = f"--{field.name.replace('_', '-')}"
                yield (
                    is_given and field.name not in _OF_A_RUN,
                    f"{flag}: is about labelling, which needs an output: name one with -o, or leave it out",
                )
        yield (
            self.target_column is not None and self.targets is None,
            f"--target-column {self.target_column}: is a column of the file that --targets names; "
            f"--label-column names one of an INPUT",
        )
        yield (
            self.fail_under is not None and not 0 <= self.fail_under <= 1,
            f"--fail-under {self.fail_under}: must be between 0 and 1",
        )
        if not self.is_of_a_run:
            yield from super()._find_faults()


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """How good the labels of a run are."""

    output: str
    """The folder of the run."""
    metrics: dict[str, Any]
    """The content of metrics.json."""
    exit_code: int
    """0; 1 below --fail-under, else 3 where more images failed than --max-failure-rate allows."""


def run(config: EvaluateConfig, *, started: float | None = None) -> EvaluateResult:
    """Label where that is to be done, compare with the true classes, and write metrics.json beside the labels.

    `started` is when the user asked for it, in seconds since 1970, for the account of the run; by default, now.
    Raises a PipelineError, which carries the exit code, where the command cannot be carried out or the run fails.
    """
    from pipeline.evaluation import evaluate_run, open_finished
    from pipeline.targets import read_targets

    config.check()
    # Before a night of labelling, not after it.
    table = read_targets(config.targets, config.target_column, retries=config.retries) if config.targets else None
    exit_code = 0
    if not config.is_of_a_run:
        exit_code = label.run(config, started=started).exit_code
    output = config.inputs[0] if config.output is None else config.output
    with explain_folder(folder := _open_run(config, output)), Progress(sys.stderr, is_quiet=config.quiet) as progress:
        account = open_finished(folder)
        num_rows, total = 0, account["counts"]["listed"]
        progress.show(lambda: f"comparing: {num_rows:,}/{total:,} images")

        def count(number: int) -> None:
            nonlocal num_rows
            num_rows = number

        metrics = evaluate_run(folder, account, table=table, tell=count)
        folder.put(METRICS, jsonlib.dumps(metrics, indent=1).encode())
    if not is_good_enough(config, metrics):
        exit_code = EXIT_NOT_GOOD_ENOUGH
    return EvaluateResult(output=output, metrics=metrics, exit_code=exit_code)


def is_good_enough(config: EvaluateConfig, metrics: dict[str, Any]) -> bool:
    """Whether --fail-under, if it was given, is reached."""
    accuracy = metrics["top1"]["value"]
    return config.fail_under is None or (accuracy is not None and accuracy >= config.fail_under)


def _open_run(config: EvaluateConfig, output: str) -> Folder:
    """The folder of the labels; raises OutputError, with what would have worked, where it is no run."""
    try:
        folder = open_run_folder(output)
        is_run = not folder.is_empty()
    except OutputError:
        if not config.is_of_a_run:
            raise
        is_run = False
    if not is_run:
        raise OutputError(
            f"{output!r} is no finished run; to label the images in it first, name an output with -o, and --model"
        )
    return folder


# ---------------------------------------------------------------------------------------------------------------
# What a person reads


def describe(result: EvaluateResult, config: EvaluateConfig) -> str:
    """The figures in the words of a person."""
    metrics = result.metrics
    counts, macro, calibration = metrics["counts"], metrics["macro"], metrics["calibration"]
    lines = [
        f"{counts['images']:,} images with a known class: {counts['right']:,} right, {counts['wrong']:,} wrong, "
        f"{counts['failed']:,} failed",
        f"top-1      {_describe_share(metrics['top1'])}",
    ]
    if metrics["top5"]:
        lines.append(f"top-5      {_describe_share(metrics['top5'])}")
    if counts["failed"] and metrics["top1"]["of_labelled"] is not None:
        lines.append(
            f"coverage   {metrics['coverage']:.2%}; of the images that could be labelled, "
            f"{metrics['top1']['of_labelled']:.2%} are right"
        )
    if macro:
        lines.append(
            f"macro      precision {macro['precision']:.2%}, recall {macro['recall']:.2%}, F1 {macro['f1']:.2%}, over "
            f"{macro['classes']:,} classes that are a target or a label"
        )
    if calibration["ece"] is not None:
        lines.append(
            f"scores     {calibration['mean_score']:.2%} on average; off by {calibration['ece']:.2%} (expected "
            f"calibration error)"
        )
    confusions = [one for one in metrics["confusion"]["top"][:_SHOWN] if one["images"] > 1]
    lines += [f"confused   {one['images']:,} of {one['target']} taken for {one['label']}" for one in confusions]
    lines += list(_describe_targets(metrics["targets"], config))
    lines += [
        f"metrics    {result.output.rstrip('/')}/{METRICS}",
        f"look       nightshift report {quote_for_shell(result.output)}",
    ]
    if not is_good_enough(config, metrics):
        lines.append(describe_shortfall(config, metrics))
    return "\n".join(map(escape_controls, lines))


def describe_shortfall(config: EvaluateConfig, metrics: dict[str, Any]) -> str:
    """Why the command ends with exit code 1."""
    accuracy = metrics["top1"]["value"]
    found = "no image has a known class" if accuracy is None else f"top-1 is {accuracy:.4f}"
    return f"not good enough: {found}, and --fail-under asks for {config.fail_under:g}"


def _describe_share(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "unknown: no image has a known class"
    return f"{share['value']:.2%}  (95 % interval {share['low']:.2%} to {share['high']:.2%})"


def _describe_targets(targets: dict[str, Any], config: EvaluateConfig) -> Iterator[str]:
    kind = {"names": "names of classes", "ids": "numbers of classes"}[targets["kind"]]
    if targets["file"] is None:
        yield f"targets    that came with the images: {kind}"
    else:
        rules = ", ".join(f"{count:,} by {rule}" for rule, count in targets["matched_by"].items())
        file = mask(config.targets or targets["file"])
        yield f"targets    column {targets['column']} of {file}: {kind}; images found {rules}"
        if targets["rows_without_image"]:
            yield (
                f"           {targets['rows_without_image']:,} of its {targets['rows']:,} rows belong to no image, "
                f"{targets['example_without_image']} for one"
            )
    if targets["images_without"]:
        yield f"           {targets['images_without']:,} images have no target, and are left out"
    if unknown := targets["unknown"]:
        shown = ", ".join(f"{name} {count:,}" for name, count in list(unknown.items())[:_SHOWN])
        more = f", and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
        yield f"           the model does not know {shown}{more}: these images count as wrong"


def main(arguments: list[str]) -> int:
    """The command `nightshift evaluate`."""
    purpose = "Say how good labels are: of images whose classes are known, or of a finished run."
    config = parse(EvaluateConfig, arguments, command="evaluate", description=purpose)
    if config.dry_run:
        config.check()
        print(describe_forecast(config))
        return 0
    result = run(config, started=psutil.Process().create_time())
    if config.json:
        print(jsonlib.dumps(result.metrics, indent=2))
        if not is_good_enough(config, result.metrics):
            print(describe_shortfall(config, result.metrics), file=sys.stderr)
    else:
        print(describe(result, config))
    return result.exit_code


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
