"""See it work, offline and in a few minutes: the whole loop, on this machine.

nightshift demo                    into ./nightshift-demo
nightshift demo -o /tmp/demo       or elsewhere

digits ─ finetune ─ model ─▶ label an archive ─ kill -9 ─ the same command again ─ evaluate ─ embed ─ report

Nothing is staged: the model has seen neither the digits that it labels nor their writers, five of the ten digits are
new to it, a few files among them are broken, and what is killed is killed. One Ray serves all steps.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import tyro

from jobs import embed, evaluate, finetune, label, report
from jobs.cli import leave, parse, run_command
from jobs.embed import EmbedConfig, EmbedResult
from jobs.evaluate import EvaluateConfig, EvaluateResult
from jobs.finetune import FinetuneConfig, FinetuneResult
from jobs.label import LabelConfig, LabelResult
from jobs.report import ReportConfig
from jobs.specimens import (
    BROKEN,
    KNOWN,
    PHOTOGRAPHS,
    Digit,
    compose_archive,
    find_path,
    read_digits,
)
from pipeline.errors import OutputError, PipelineError
from pipeline.run import open_run_folder
from pipeline.storage import has_scheme, path_to_uri
from pipeline.terminal import format_seconds, quote_for_shell, quote_for_sql

MODEL_DIR: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "digits")
"""The model directory that `examples/train_digits.py` makes."""
MIN_ACCURACY: Final = 0.9

MARKER: Final = "nightshift-demo.txt"
_MARKER_TEXT: Final = """\
`nightshift demo` made this folder, and will make it anew when it is run here again.

training/   digits in a folder for each, to train on and to validate on
finetuned/  what was trained: model/ is what labels, run.json and metrics.jsonl say how it went
archive/    images to be labelled: files, a tar, a zip, a Parquet file, some of them broken on purpose
labels/     what was labelled: run.json says how it went, metrics.json how well, predictions/ has a row for each image
vectors/    a vector of features for each image

report.html in finetuned/ and labels/ shows all that to a person.
"""

# Parts that are there when the labelling is killed; it has some thirty.
_PARTS_BEFORE_THE_KILL: Final = 3
_LOOK_S: Final = 0.005
# Pixels at least this bright are ink where a digit is drawn with characters.
_MIN_INK: Final = 110
_NUM_FIRST: Final = 4
_NUM_UNSURE: Final = 2
_COLUMN: Final = 12
_HEADING: Final = 8


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demonstration."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "nightshift-demo"
    """A folder for images, model and labels; one that an earlier demo made is made anew."""

    @property
    def archive(self) -> str:
        """Where the images are written to."""
        return os.path.join(self.output, "archive")

    @property
    def root(self) -> str:
        """The same as a URI, as those of its images begin."""
        return path_to_uri(os.path.abspath(self.archive))

    @property
    def training(self) -> str:
        """Where the digits to train on are written to."""
        return os.path.join(self.output, "training")

    @property
    def finetuned(self) -> str:
        """The output of the fine-tuning job."""
        return os.path.join(self.output, "finetuned")

    @property
    def labels(self) -> str:
        """The output of the labelling job."""
        return os.path.join(self.output, "labels")

    @property
    def vectors(self) -> str:
        """The output of the embedding job."""
        return os.path.join(self.output, "vectors")

    @property
    def finetune_job(self) -> FinetuneConfig:
        """The fine-tuning job, the same as for any other images."""
        return FinetuneConfig(
            inputs=(self.training,),
            output=self.finetuned,
            model=MODEL_DIR,
            epochs=12,
            batch_size=32,
            lr=0.01,
            backbone_lr_scale=0.3,
            augment="none",  # a digit in the mirror is another one, or none
            precision="fp32",
            overwrite=True,
            num_workers="1",
        )

    @property
    def label_job(self) -> LabelConfig:
        """The labelling job, the same as for any other archive."""
        return LabelConfig(
            inputs=(self.archive,),
            output=self.labels,
            model=os.path.join(self.finetuned, "model"),
            target="folder",
            shard_size=32,  # an archive as small as this one would be few shards, and over before it can be killed
            num_workers="1",  # a second would take longer to import PyTorch than the first one takes for everything
        )

    @property
    def embed_job(self) -> EmbedConfig:
        """The embedding job, the same as for any other archive."""
        return EmbedConfig(
            inputs=(self.archive,),
            output=self.vectors,
            model=os.path.join(self.finetuned, "model"),
            normalize=True,
            overwrite=True,
            num_workers="1",
        )


def run(config: DemoConfig) -> float:
    """Go through the whole loop, and say what came out; the share of the digits that are labelled right."""
    examples, digits = read_digits("training"), read_digits("held-out")
    write_archive(config, compose_archive(digits), examples)
    say(_describe_training(config, len(examples)))

    from pipeline.cluster import find_address, open_cluster  # here, since Ray takes seconds to import

    with open_cluster("local"):  # a demo is seen on this machine, whatever cluster RAY_ADDRESS names
        say(_describe_trained(finetune.run(config.finetune_job)))
        say(_describe_archive(config, len(digits)))
        say(_describe_kill(kill_in_the_middle(config, find_address())))
        labels = label.run(config.label_job)
        rows = read_rows(config, labels, digits)
        say(_describe_counts(labels), _describe_digits(digits, rows), _describe_photographs(rows))
        say(_describe_failures(rows))
        evaluated = evaluate.run(EvaluateConfig(inputs=(config.labels,)))
        say(_describe_accuracy(config, evaluated), _describe_query(labels), _describe_embedding(config))
        vectors = embed.run(config.embed_job)
        say(_describe_neighbours(find_neighbours(config, vectors, digits)))
    pages = [report.run(ReportConfig(run=place)).path for place in (config.labels, config.finetuned)]
    say(_describe_pages(config, pages), _describe_next())
    accuracy: float = evaluated.metrics["top1"]["value"]
    return accuracy


def say(*paragraphs: str) -> None:
    print("\n\n".join(paragraphs), end="\n\n", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# The archive


def write_archive(config: DemoConfig, files: Mapping[str, bytes], examples: Iterable[Digit] = ()) -> None:
    """Write `files` below `config.archive`, and `examples` in a folder for each digit, over those of an earlier demo.

    Raises OutputError where the folder holds something that no demo made.
    """
    output = config.output
    if has_scheme(output):
        raise OutputError(f"output {output!r}: the demo makes its archive in a folder of this machine")
    for place in (config.finetuned, config.labels, config.vectors):
        open_run_folder(place)  # raises, before anything is written, where no run could be
    try:
        os.makedirs(output, exist_ok=True)
        if os.listdir(output) and not os.path.isfile(os.path.join(output, MARKER)):
            raise OutputError(f"output {output!r} is not empty and no demo made it; name another folder with -o")
        Path(output, MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
        contents = {os.path.join(config.archive, name): content for name, content in files.items()}
        contents |= {os.path.join(config.training, _find_place(digit)): digit.png for digit in examples}
        for path, content in ((Path(name), content) for name, content in contents.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        where = error.filename or output
        raise OutputError(f"cannot write to {where!r}: {error.strerror}; name another folder with -o") from error


def _find_place(digit: Digit) -> str:
    """Where a digit to train on lies: every tenth is set aside, so that all demos train on the same ones."""
    return f"{'val' if digit.index % 10 == 0 else 'train'}/{digit.name}/{digit.index:04d}.png"


# ---------------------------------------------------------------------------------------------------------------
# The kill


def kill_in_the_middle(config: DemoConfig, address: str) -> int:
    """Start the labelling in a process of its own, and `kill -9` that; returns how many parts it has left behind."""
    before = _list_parts(config)  # of an earlier demo, until they are overwritten
    command = [sys.executable, "-m", "jobs", *_compose_label_command(config), "--overwrite", "--num-workers", "1"]
    process = subprocess.Popen(
        [*command, "--address", address, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and len(_list_parts(config) - before) < _PARTS_BEFORE_THE_KILL:
            time.sleep(_LOOK_S)
    finally:
        process.kill()
        process.wait()
    return len(_list_parts(config) - before)


def _list_parts(config: DemoConfig) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(os.path.join(config.labels, "predictions")))
    return set()


def _compose_label_command(config: DemoConfig) -> list[str]:
    job = config.label_job
    command = ["label", *job.inputs, "-o", config.labels, "-m", job.model, "--target", job.target]
    return [*command, "--shard-size", str(job.shard_size)]


# ---------------------------------------------------------------------------------------------------------------
# What came out

Row = dict[str, Any]


def read_rows(config: DemoConfig, result: LabelResult, digits: list[Digit]) -> dict[str, Row]:
    """The rows of the predictions, by the path of their image in the archive, or in what holds it there."""
    columns = ["uri", "label", "score", "predictions", "target", "error"]
    rows = result.dataset().to_table(columns=columns).sort_by("uri").to_pylist()
    return {find_path(row["uri"], digits, root=config.root): row for row in rows}


def find_neighbours(config: DemoConfig, result: EmbedResult, digits: list[Digit]) -> float:
    """The share of the digits whose vector is nearest to that of the same digit, in another image."""
    uris, vectors = result.read_vectors()
    names = {digit.path: digit.name for digit in digits}
    shown = np.array([names.get(find_path(uri, digits, root=config.root), "") for uri in uris])
    vectors, shown = vectors[shown != ""], shown[shown != ""]
    cosines = vectors @ vectors.T  # they have the length 1
    np.fill_diagonal(cosines, -1)
    return float(np.mean(shown[cosines.argmax(axis=1)] == shown))


def compose_query(predictions: str) -> str:
    """Three lines of SQL that say what was taken for what."""
    return (
        "SELECT target, label, count(*) AS times\n"
        f"    FROM {quote_for_sql(predictions)}\n"
        "    WHERE label <> target GROUP BY ALL ORDER BY times DESC"
    )


# ---------------------------------------------------------------------------------------------------------------
# What a person reads


def _describe_training(config: DemoConfig, num_digits: int) -> str:
    job = config.finetune_job
    command = ["nightshift", "finetune", *job.inputs, "-o", config.finetuned, "-m", job.model]
    for name in ("epochs", "batch_size", "lr", "backbone_lr_scale", "augment"):
        command += [f"--{name.replace('_', '-')}", str(getattr(job, name))]
    return (
        f"{config.training}: {num_digits} handwritten digits, in a folder for each.\n"
        f"A model that knows only {KNOWN[0]} to {KNOWN[-1]} learns all ten from them, as this command would do it:\n"
        f"  {shlex.join(command)}"
    )


def _describe_trained(result: FinetuneResult) -> str:
    best, seconds = result.account["best"], result.account["throughput"]["seconds"]
    return (
        f"{result.account['epochs']} epochs in {format_seconds(seconds)}; "
        f"{best['val_top1']:.1%} of the digits that were set aside are right."
    )


def _describe_archive(config: DemoConfig, num_digits: int) -> str:
    return (
        f"{config.archive}: {num_digits} handwritten digits in files, a tar, a zip and a Parquet file, "
        f"{len(PHOTOGRAPHS)} photographs,\n"
        f"and {len(BROKEN)} broken files among them. They are labelled with that model, as this command would do it:\n"
        f"  {shlex.join(['nightshift', *_compose_label_command(config)])}"
    )


def _describe_kill(num_parts: int) -> str:
    if not num_parts:
        return "It was over before it could be killed; the same command has nothing left to do:"
    return f"Killed in the middle, as by kill -9, with {num_parts} parts committed. The same command goes on there:"


def _describe_counts(result: LabelResult) -> str:
    counts = result.counts
    return (
        f"{counts['listed']} images, each of them one row: {counts['labelled']} labelled, {counts['failed']} failed; "
        f"nothing was lost, and nothing done twice."
    )


def _describe_digits(digits: list[Digit], rows: Mapping[str, Row]) -> str:
    """The first few digits, and those of the rest that the model was least sure of, side by side."""
    labelled = [digit for digit in digits if rows[digit.path]["label"]]
    unsure = sorted(labelled[_NUM_FIRST:], key=lambda digit: rows[digit.path]["score"])
    shown = labelled[:_NUM_FIRST] + unsure[:_NUM_UNSURE]
    table: list[tuple[str, ...]] = [("", *cells) for cells in zip(*map(_draw, shown), strict=True)]
    table.append(("label", *(rows[digit.path]["label"] for digit in shown)))
    table.append(("score", *(f"{rows[digit.path]['score']:.1%}" for digit in shown)))
    table.append(("target", *(digit.name for digit in shown)))
    lines = [f"The first {_NUM_FIRST} digits, and the {_NUM_UNSURE} that the model was least sure of:"]
    for heading, *cells in table:
        lines.append(f"  {heading:<{_HEADING}}{''.join(f'{cell:<{_COLUMN}}' for cell in cells)}".rstrip())
    return "\n".join(lines)


def _draw(digit: Digit) -> list[str]:
    """A digit in four lines of text: each character is two pixels, one above the other."""
    ink = (digit.pixels >= _MIN_INK).astype(int)
    return ["".join(" ▀▄█"[pair] for pair in line) for line in (ink[::2] + 2 * ink[1::2]).tolist()]


def _describe_photographs(rows: Mapping[str, Row]) -> str:
    lines = ["The photographs; a model that knows only digits finds digits everywhere:"]
    for name in PHOTOGRAPHS:
        best = rows[name]["predictions"] or []
        guesses = ", ".join(f"{guess['label']} {guess['score']:.1%}" for guess in best[:3])
        lines.append(f"  {name:<12}{guesses}")
    return "\n".join(lines)


def _describe_failures(rows: Mapping[str, Row]) -> str:
    failed = {path: row["error"] for path, row in rows.items() if row["error"]}
    width = max(map(len, failed), default=0)
    lines = ["The broken files; each is a row with its reason, and none ended the run:"]
    return "\n".join([*lines, *(f"  {path:<{width}}  {error}" for path, error in failed.items())])


def _describe_accuracy(config: DemoConfig, result: EvaluateResult) -> str:
    counts, top1 = result.metrics["counts"], result.metrics["top1"]
    return (
        f"Are the labels right? nightshift evaluate {shlex.quote(config.labels)}\n"
        f"  {top1['value']:.1%} of {counts['images']} digits (95 % interval {top1['low']:.1%} to {top1['high']:.1%}), "
        f"by people whose writing the model was not\n  trained on; the {counts['failed']} broken ones count as wrong."
    )


def _describe_query(result: LabelResult) -> str:
    return f"What was taken for what? Ask DuckDB:\n  duckdb -c {quote_for_shell(compose_query(result.predictions))}"


def _describe_embedding(config: DemoConfig) -> str:
    job = config.embed_job
    command = ["nightshift", "embed", *job.inputs, "-o", config.vectors, "-m", job.model, "--normalize"]
    return f"The same images as vectors, to search and to sort by likeness:\n  {shlex.join(command)}"


def _describe_neighbours(share: float) -> str:
    return f"Of the digits, {share:.1%} have the same digit as their nearest neighbour, by the cosine of their vectors."


def _describe_pages(config: DemoConfig, pages: list[str]) -> str:
    commands = [f"  nightshift report {shlex.quote(place)}" for place in (config.labels, config.finetuned)]
    width = max(map(len, commands))
    lines = [f"{command:<{width}}   {page}" for command, page in zip(commands, pages, strict=True)]
    return "\n".join(["Look at it, in a browser:", *lines])


def _describe_next() -> str:
    return (
        "ImageNet's models, which know photographs, need one download, on a machine with network:\n"
        "  nightshift label photos/ -o labels/ --model resnet50"
    )


def main(arguments: list[str]) -> int:
    """The command `nightshift demo`."""
    purpose = "Go through the whole loop with handwritten digits, on this machine and offline."
    config = parse(DemoConfig, arguments, command="demo", description=purpose)
    began = time.monotonic()
    accuracy = run(config)
    print(f"All of it took {format_seconds(time.monotonic() - began)}.")
    if accuracy < MIN_ACCURACY:
        raise PipelineError(
            f"only {accuracy:.1%} of the digits are right, and at least {MIN_ACCURACY:.0%} should be: "
            f"something on this machine computes differently"
        )
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
