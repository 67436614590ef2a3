"""The demo: its digits, its model directory, its archive, and the whole command on a real Ray.

pytest tests/test_demo.py
pytest tests/test_demo.py -k "not command"      what needs no Ray
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs import demo, specimens
from jobs.cli import parse
from jobs.demo import MODEL_DIR, DemoConfig
from jobs.embed import EmbedConfig
from jobs.finetune import FinetuneConfig
from jobs.label import LabelConfig
from jobs.specimens import CATEGORIES, Digit
from pipeline.answers import BestClasses
from pipeline.decode import decode
from pipeline.errors import ConfigError, DecodeError, OutputError
from pipeline.fetch import Fetcher
from pipeline.models import Model, open_model
from pipeline.predict import Predictor
from pipeline.sources import ListedImage
from pipeline.storage.uri import locate
from pipeline.terminal import quote_for_shell

MAX_MODEL_DIR_BYTES = 500_000


@pytest.fixture(scope="module")
def held_out() -> list[Digit]:
    return specimens.read_digits("held-out")


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(MODEL_DIR)


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------
# The digits


def test_every_digit_is_either_for_training_or_held_out(held_out: list[Digit]) -> None:
    training = [digit.index for digit in specimens.read_digits("training")]
    assert sorted(training + [digit.index for digit in held_out]) == list(range(1797))


def test_both_halves_have_every_category() -> None:
    for half in ("training", "held-out"):
        digits = specimens.read_digits(half)
        assert len(digits) > 800
        assert {digit.name for digit in digits} == set(CATEGORIES)


def test_halves_meet_where_a_writer_begins(held_out: list[Digit]) -> None:
    # Each writer was asked for zero to nine, three times, before anything else.
    assert [digit.name for digit in held_out[:20]] == [*CATEGORIES, *CATEGORIES]
    assert specimens.read_digits("training")[-1].name == "nine"


def test_digit_file_keeps_every_pixel(held_out: list[Digit]) -> None:
    for digit in held_out[:10]:
        assert (np.asarray(Image.open(io.BytesIO(digit.png))) == digit.pixels).all()
        assert digit.pixels.max() > 200


def test_missing_scikit_learn_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'nightshift-runner\[demo\]'"):
        demo.main(["-o", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


# ---------------------------------------------------------------------------------------------------------------
# The model directory


def test_model_directory_is_small() -> None:
    assert sum(len(content) for content in list_files(Path(MODEL_DIR)).values()) < MAX_MODEL_DIR_BYTES


def test_model_directory_knows_the_categories_by_name(model: Model) -> None:
    assert model.categories == specimens.KNOWN


def test_model_reads_held_out_digits(model: Model, held_out: list[Digit]) -> None:
    known = [digit for digit in held_out if digit.name in specimens.KNOWN]
    pixels = torch.stack([model.preset.exact(decode(digit.png)) for digit in known])
    label_ids = Predictor(model, BestClasses(1), precision="fp32")(pixels).label_ids[:, 0]
    right = [CATEGORIES[label_id] == digit.name for label_id, digit in zip(label_ids, known, strict=True)]
    assert right.count(True) / len(right) >= demo.MIN_ACCURACY


# ---------------------------------------------------------------------------------------------------------------
# The archive


def test_archive_keeps_all_images_in_every_way_there_is(tmp_path: Path, held_out: list[Digit]) -> None:
    config = DemoConfig(output=str(tmp_path / "demo"))
    files = specimens.compose_archive(held_out)
    demo.write_archive(config, files)
    assert list_files(tmp_path / "demo" / "archive") == files
    assert sorted(os.listdir(tmp_path / "demo")) == ["archive", demo.MARKER]

    images = list_archive(config)
    targets = {specimens.find_path(image.uri, held_out, root=config.archive): image.target for image in images}
    broken = {specimens.TRUNCATED: "three", specimens.EMPTY: "five", specimens.TEXT: None}
    digits = {digit.path: digit.name for digit in held_out}
    assert targets == {**digits, **broken, **dict.fromkeys(specimens.PHOTOGRAPHS)}
    assert len(images) == len(targets)
    places = [locate(image.uri) for image in images]
    assert [place.scheme for place in places].count("zip") == specimens.NUM_PACKED
    assert [place.scheme for place in places].count("tar") == specimens.NUM_PACKED + 3
    assert sum(place.row is not None for place in places) == specimens.NUM_PACKED


def test_broken_files_are_broken_each_in_its_own_way_and_no_others(tmp_path: Path, held_out: list[Digit]) -> None:
    config = DemoConfig(output=str(tmp_path / "demo"))
    demo.write_archive(config, specimens.compose_archive(held_out))
    kinds, fetcher = {}, Fetcher(retries=0)
    for image in list_archive(config):
        try:
            decode(fetcher.read(image)[0])
        except DecodeError as error:
            kinds[specimens.find_path(image.uri, held_out, root=config.archive)] = error.kind
    assert kinds == {
        specimens.TRUNCATED: "OSError",
        specimens.EMPTY: "EmptyFile",
        specimens.TEXT: "UnidentifiedImageError",
    }


def list_archive(config: DemoConfig) -> list[ListedImage]:
    """What the labelling job would list."""
    return list(config.label_job.open_inputs().list_images())


def test_archive_is_made_anew_and_what_else_lies_there_stays(tmp_path: Path, held_out: list[Digit]) -> None:
    config = DemoConfig(output=str(tmp_path))
    files = specimens.compose_archive(held_out[:20])
    demo.write_archive(config, files)
    (tmp_path / "archive" / specimens.EMPTY).write_bytes(b"no longer empty")
    (tmp_path / "mine.txt").write_text("mine")
    demo.write_archive(config, files)
    assert list_files(tmp_path / "archive") == files
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_folder_that_no_demo_made_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="no demo made it"):
        demo.write_archive(DemoConfig(output=str(tmp_path)), {"new": b""})
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("output", ["thesis.txt", "thesis.txt/demo", "s3://bucket/demo"])
def test_output_that_can_be_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError):
        demo.write_archive(DemoConfig(output=output), {"new": b""})
    assert os.listdir(tmp_path) == ["thesis.txt"]


# ---------------------------------------------------------------------------------------------------------------
# What a person reads


@pytest.mark.parametrize("folder", ["demo", "it's 100% [mine] *", 'a "b" $HOME `c` !e ?'])
def test_query_survives_the_shell_and_finds_the_parts(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    part = str(tmp_path / folder / "part-000000.parquet")
    table = pa.table({"target": ["one", "one", "six", "six"], "label": ["two", "two", "six", None]})
    pq.write_table(table, part)
    text = quote_for_shell(demo.compose_query(str(tmp_path / folder)))
    query = subprocess.run(["sh", "-c", f"printf %s {text}"], capture_output=True, text=True, check=True).stdout
    assert len(query.splitlines()) == 3
    assert rows(query) == [("one", "two", 2)]


def test_help_needs_neither_torch_nor_ray_nor_scikit_learn() -> None:
    code = (
        "import sys; from jobs.demo import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'ray', 'sklearn'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--output" in done.stdout


# ---------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.slow
def test_command_goes_through_the_whole_loop_and_what_it_says_is_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: Any
) -> None:
    output = str(tmp_path / "demo")
    assert demo.main(["-o", output]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 120 or output in line for line in text.splitlines())
    for error in ("EmptyFile: ", "OSError: ", "UnidentifiedImageError: "):
        assert error in text

    # The first driver was killed when some parts were there, and the second one made the others.
    parts = sorted(Path(output, "labels", "predictions").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    killed, finished = json.loads(Path(output, "labels", "run.json").read_text())["invocations"]
    num_left = int(re.search(r"as by kill -9, with (\d+) parts committed", text)[1])
    assert (killed["state"], finished["state"]) == ("killed", "done")
    assert 0 < num_left < len(parts)
    assert rows(f"SELECT count(*), count(DISTINCT uri) FROM '{output}/labels/predictions/*.parquet'") == [(887, 887)]

    assert f"{measure_accuracy(output):.1%} of 884 digits" in text
    share = float(re.search(r"Of the digits, ([\d.]+)% have the same digit", text)[1])
    assert share > 90
    for page in ("labels/report.html", "finetuned/report.html"):
        assert page in text
        assert "<svg" in Path(output, page).read_text()

    shown = find_command(text, "label", output)
    identity = parse(LabelConfig, shown, command="label", description="").identity
    assert identity == DemoConfig(output=output).label_job.identity
    trained = parse(FinetuneConfig, find_command(text, "finetune", output), command="finetune", description="")
    assert replace(trained, precision="fp32").identity == DemoConfig(output=output).finetune_job.identity
    embedded = parse(EmbedConfig, find_command(text, "embed", output), command="embed", description="")
    assert embedded.identity == DemoConfig(output=output).embed_job.identity

    snippet = text[text.index("duckdb -c ") :].split("\n\n")[0]
    mistakes = rows(shlex.split(snippet)[2])
    assert sum(times for _, _, times in mistakes) == round(884 * (1 - measure_accuracy(output))) - 2


def find_command(text: str, job: str, output: str) -> list[str]:
    """The arguments of a command that was shown."""
    *_, line = (line for line in text.splitlines() if line.startswith(f"  nightshift {job} ") and output in line)
    return shlex.split(line)[2:]


def measure_accuracy(output: str) -> float:
    """From the parts alone, without the code under test: what failed is not right."""
    parts = f"{output}/labels/predictions/*.parquet"
    query = f"SELECT avg(coalesce((label = target)::INT, 0)) FROM '{parts}' WHERE target IS NOT NULL"
    ((accuracy,),) = rows(query)
    return float(accuracy)


def rows(query: str) -> list[Any]:
    """What DuckDB answers."""
    return duckdb.connect().sql(query).fetchall()
