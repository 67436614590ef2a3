"""See it work, offline and in about two minutes: fine-tune a model, then label an archive with it, on this machine.

nightshift demo                    into ./nightshift-demo
nightshift demo -o /tmp/demo       or elsewhere

digits of scikit-learn ─ finetune, on Ray ─ model ─▶ more digits, photographs ─ label, on Ray ─ what a person reads

Nothing is staged: the model has seen neither the digits that it labels nor their writers, five of the ten digits are
new to it, and a few files among them are broken.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from jobs import finetune, label
from jobs.cli import leave, parse, run_command
from jobs.finetune import FinetuneConfig, FinetuneResult
from jobs.label import LabelConfig, LabelResult
from pipeline.errors import ConfigError, OutputError, PipelineError
from pipeline.run import open_run_folder
from pipeline.storage import has_scheme, path_to_uri
from pipeline.terminal import format_seconds, quote_for_shell, quote_for_sql

CATEGORIES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN: Final = CATEGORIES[:5]
"""The digits that the model knows before it is fine-tuned."""
MODEL_DIR: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "digits")
"""The model directory that `examples/train_digits.py` makes."""
MIN_ACCURACY: Final = 0.93

# The data set keeps each writer's digits together; of the writers' first digits, this is the nearest to its middle.
FIRST_HELD_OUT: Final = 915

PHOTOGRAPHS: Final = ("china.jpg", "flower.jpg")
PHOTOGRAPHS_DIR: Final = "photographs"
TRUNCATED: Final = "digits/three/truncated.png"
EMPTY: Final = "digits/five/empty.png"
TEXT: Final = f"{PHOTOGRAPHS_DIR}/text.jpg"
BROKEN: Final = (TRUNCATED, EMPTY, TEXT)

MARKER: Final = "nightshift-demo.txt"
_MARKER_TEXT: Final = """\
`nightshift demo` made this folder, and will make it anew when it is run here again.

training/   digits in a folder for each, to train on
finetuned/  what was trained: model/ is what labels, run.json and metrics.jsonl say how it went
archive/    images to be labelled, some of them broken on purpose
labels/     what was labelled: run.json says how it went, predictions/ has a row for each image
"""

_MAX_GREY: Final = 16
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
            address="local",
        )

    @property
    def label_job(self) -> LabelConfig:
        """The labelling job, the same as for any other archive."""
        return LabelConfig(
            inputs=(self.archive,),
            output=self.labels,
            model=os.path.join(self.finetuned, "model"),
            target="folder",
            overwrite=True,
            num_workers="1",  # a second would take longer to import PyTorch than the first one takes for everything
            address="local",  # a demo is seen on this machine, whatever cluster RAY_ADDRESS names
        )


def run(config: DemoConfig) -> float:
    """Fine-tune, label, and say what came out; the share of the digits that are labelled right."""
    examples, digits = read_digits("training"), read_digits("held-out")
    write_archive(config, compose_archive(digits), examples)
    print(_describe_training(config, len(examples)), flush=True)
    trained = finetune.run(config.finetune_job)
    print(_describe_trained(trained))
    print(_describe_archive(config, len(digits)), flush=True)
    result = label.run(config.label_job)
    rows = read_rows(config, result)
    accuracy = find_accuracy(digits, rows)
    paragraphs = (
        _describe_counts(result),
        _describe_digits(digits, rows),
        _describe_photographs(rows),
        _describe_failures(rows),
        f"Accuracy: {accuracy:.1%} of the {len(digits)} digits, by people whose writing the model was not trained on.",
        _describe_query(result),
        _describe_next(),
    )
    print("\n\n".join(paragraphs))
    return accuracy


# ---------------------------------------------------------------------------------------------------------------
# The digits, and which of them are whose


@dataclass(frozen=True, slots=True)
class Digit:
    """A handwritten digit of scikit-learn's data set."""

    index: int
    """Its place in the data set."""
    name: str
    """What it shows, which is one of CATEGORIES."""
    pixels: NDArray[np.uint8]  # (8, 8), ink is bright

    @property
    def path(self) -> str:
        """Where it lies in the archive; the folder it lies in is its true label."""
        return f"digits/{self.name}/{self.index:04d}.png"

    @property
    def png(self) -> bytes:
        """The file's content."""
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG")
        return file.getvalue()


def read_digits(half: Literal["training", "held-out"]) -> list[Digit]:
    """One half of the data set: the first is for training, the second for everything that judges the model.

    No writer has digits in both.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            f"the demo's images come with scikit-learn, which cannot be imported ({error}): "
            f"pip install 'nightshift-runner[demo]'"
        ) from error
    dataset = load_digits()
    images = np.rint(dataset.images * (255 / _MAX_GREY)).astype(np.uint8)
    indices = range(FIRST_HELD_OUT) if half == "training" else range(FIRST_HELD_OUT, len(images))
    return [Digit(index, CATEGORIES[dataset.target[index]], images[index]) for index in indices]


# ---------------------------------------------------------------------------------------------------------------
# The archive


def compose_archive(digits: list[Digit]) -> dict[str, bytes]:
    """All files of the archive, by path: the digits, the two photographs, and the broken files among them."""
    photographs = resources.files("sklearn.datasets.images")
    whole = next(digit.png for digit in digits if digit.name == "three")
    return {
        **{digit.path: digit.png for digit in digits},
        **{f"{PHOTOGRAPHS_DIR}/{name}": (photographs / name).read_bytes() for name in PHOTOGRAPHS},
        TRUNCATED: whole[: len(whole) // 2],
        EMPTY: b"",
        TEXT: b"The name of this file says more than is true.\n",
    }


def write_archive(config: DemoConfig, files: Mapping[str, bytes], examples: Iterable[Digit] = ()) -> None:
    """Write `files` below `config.archive`, and `examples` in a folder for each digit, over those of an earlier demo.

    Raises OutputError where the folder holds something that no demo made.
    """
    output = config.output
    if has_scheme(output):
        raise OutputError(f"output {output!r}: the demo makes its archive in a folder of this machine")
    for place in (config.finetuned, config.labels):
        open_run_folder(place)  # raises, before anything is written, where no run could be
    try:
        os.makedirs(output, exist_ok=True)
        if os.listdir(output) and not os.path.isfile(os.path.join(output, MARKER)):
            raise OutputError(f"output {output!r} is not empty and no demo made it; name another folder with -o")
        Path(output, MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
        contents = {os.path.join(config.archive, name): content for name, content in files.items()}
        contents |= {os.path.join(config.training, d.name, f"{d.index:04d}.png"): d.png for d in examples}
        for path, content in ((Path(name), content) for name, content in contents.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        where = error.filename or output
        raise OutputError(f"cannot write to {where!r}: {error.strerror}; name another folder with -o") from error


# ---------------------------------------------------------------------------------------------------------------
# What came out

Row = dict[str, Any]


def read_rows(config: DemoConfig, result: LabelResult) -> dict[str, Row]:
    """The rows of the predictions, by the path of their image in the archive."""
    root = path_to_uri(os.path.abspath(config.archive)) + "/"
    columns = ["uri", "label", "score", "predictions", "target", "error"]
    rows = result.dataset().to_table(columns=columns).sort_by("uri").to_pylist()
    return {row["uri"].removeprefix(root): row for row in rows}


def find_accuracy(digits: list[Digit], rows: Mapping[str, Row]) -> float:
    """The share of the digits that are labelled as what they show."""
    num_right = [rows[digit.path]["label"] == digit.name for digit in digits].count(True)
    return num_right / len(digits)


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
        f"  {shlex.join(command)}\n"
    )


def _describe_trained(result: FinetuneResult) -> str:
    best, seconds = result.account["best"], result.account["throughput"]["seconds"]
    return (
        f"{result.account['epochs']} epochs in {format_seconds(seconds)}, start of Ray included; "
        f"{best['val_top1']:.1%} of the digits that were set aside are right.\n"
    )


def _describe_archive(config: DemoConfig, num_digits: int) -> str:
    job = config.label_job
    command = ["nightshift", "label", *job.inputs, "-o", config.labels, "-m", job.model, "--target", job.target]
    return (
        f"{config.archive}: {num_digits} handwritten digits and {len(PHOTOGRAPHS)} photographs, "
        f"with {len(BROKEN)} broken files among them.\n"
        f"They are labelled with that model, as this command would do it:\n"
        f"  {shlex.join(command)}\n"
    )


def _describe_counts(result: LabelResult) -> str:
    counts, seconds = result.account["counts"], result.account["throughput"]["seconds"]
    return (
        f"{counts['listed']} images in {format_seconds(seconds)}, start of Ray included: "
        f"{counts['labelled']} labelled, {counts['failed']} failed."
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
        best = rows[f"{PHOTOGRAPHS_DIR}/{name}"]["predictions"] or []
        guesses = ", ".join(f"{guess['label']} {guess['score']:.1%}" for guess in best[:3])
        lines.append(f"  {name:<12}{guesses}")
    return "\n".join(lines)


def _describe_failures(rows: Mapping[str, Row]) -> str:
    failed = {path: row["error"] for path, row in rows.items() if row["error"]}
    width = max(map(len, failed), default=0)
    lines = ["The broken files; each is a row with its reason, and none ended the run:"]
    return "\n".join([*lines, *(f"  {path:<{width}}  {error}" for path, error in failed.items())])


def _describe_query(result: LabelResult) -> str:
    return f"What was taken for what? Ask DuckDB:\n  duckdb -c {quote_for_shell(compose_query(result.predictions))}"


def _describe_next() -> str:
    return (
        "ImageNet's models, which know photographs, need one download, on a machine with network:\n"
        "  nightshift label photos/ -o labels/ --model resnet50"
    )


def main(arguments: list[str]) -> int:
    """The command `nightshift demo`."""
    purpose = "Fine-tune a model on handwritten digits and label an archive with it, on this machine and offline."
    accuracy = run(parse(DemoConfig, arguments, command="demo", description=purpose))
    if accuracy < MIN_ACCURACY:
        raise PipelineError(
            f"only {accuracy:.1%} of the digits are right, and at least {MIN_ACCURACY:.0%} should be: "
            f"something on this machine computes differently"
        )
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
