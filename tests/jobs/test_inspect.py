"""`nightshift inspect` as a user runs it: what would be read, on stdout, in a moment.

pytest tests/jobs/test_inspect.py
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import run_command
from jobs.inspect import main
from pipeline.listing import Inputs
from pipeline.plan import write_listing
from pipeline.sources import ListingOptions
from pipeline.storage import LocalFolder


@pytest.fixture
def archive(tmp_path, make_images) -> Path:
    """Seven files, five members of a tar and nine rows, 20 kB in all, beside what is no image or damaged."""
    folder = tmp_path / "archive"
    paths = make_images(folder / "files", 7)
    contents = [Path(path).read_bytes() for path in paths]
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number in range(5):
            for name, content in ((f"{number}.jpg", contents[number]), (f"{number}.cls", b"ant")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    pq.write_table(pa.table({"image": contents[:3] * 3, "label": ["bee"] * 9}), folder / "y.parquet", row_group_size=4)
    (folder / "notes.md").touch()
    (folder / "z.zip").write_bytes(b"no zip")
    return folder


def inspect(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    code = run_command(main, [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_summary_says_what_would_be_read(archive, capsys):
    code, out, _ = inspect(capsys, archive)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(" "))
    assert lines["images"] == "21: 9 in 1 Parquet file, 7 files, 5 in 1 tar"
    assert lines["formats"] == "21 jpg"
    assert lines["labels"] == "2 on 14 images: bee 9, ant 5"
    assert lines["shards"] == "1 of up to 22 images"
    assert lines["skipped"] == "1 .md"
    assert f"  {archive}/z.zip: BadZipFile: File is not a zip file" in out.splitlines()


def test_bytes_are_those_on_disk(archive, capsys):
    files = sum(path.stat().st_size for path in archive.glob("files/*"))
    members = sum((archive / "files" / f"{n:05d}.jpg").stat().st_size for n in range(5))
    document = json.loads(inspect(capsys, archive, "--json")[1])
    assert document["num_bytes"] == files + members + (archive / "y.parquet").stat().st_size


def test_json_is_one_document_and_nothing_else(archive, capsys):
    code, out, _ = inspect(capsys, archive, archive / "files", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["num_images"] == 22
    assert document["kinds"] == {"parquet": 9, "file": 7, "tar": 5}
    assert document["containers"] == {"tar": 1, "parquet": 1}
    assert document["labels"] == {"bee": 9, "ant": 5}
    assert document["shards"] == {"count": 1, "shard_size": 64, "largest": 22}
    assert document["num_repeated"] == 7
    assert document["skipped"] == {".md": 1}
    assert list(document["errors"]) == [f"{archive}/z.zip"]


def test_shards_are_those_of_the_plan(tmp_path, capsys):
    pq.write_table(pa.table({"image": [b"x"] * 1000}), tmp_path / "x.parquet", row_group_size=90)
    folder = LocalFolder(tmp_path / "out", scratch="tmp")
    listing = write_listing(folder, Inputs((f"{tmp_path}/x.parquet",), options=ListingOptions()).list_images())
    document = json.loads(inspect(capsys, tmp_path / "x.parquet", "--json")[1])
    assert document["shards"] == {
        "count": listing.num_shards,
        "shard_size": listing.shard_size,
        "largest": listing.max_shard_images,
    }
    assert listing.num_shards == 12


def test_images_named_twice_are_told(archive, capsys):
    out = inspect(capsys, archive, archive / "files")[1]
    assert "repeated 7 times an image is named that was named before; it is read once" in out.splitlines()


def test_flags_mean_what_they_mean_for_label(archive, capsys):
    document = json.loads(inspect(capsys, archive / "files", "--target", "folder", "--exclude", "*0.jpg", "--json")[1])
    assert document["labels"] == {"files": 6}
    assert document["skipped"] == {"left out by --include/--exclude": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: INPUT: name at least one folder or file"),
        (["{archive}/nowhere", "{archive}/none"], "error: input '{archive}/nowhere' does not exist"),
        (["{archive}/*.jpg"], "error: found no images in '{archive}/*.jpg' (there are "),
        (["{archive}/y.parquet", "--image-column", "photo"], "error: --image-column photo: {archive}/y.parquet has no"),
        (["https://host/a.jpg"], "error: cannot list 'https://host/a.jpg': put the addresses"),
    ],
)
def test_what_cannot_be_inspected_is_one_clear_error(archive, capsys, arguments, message):
    code, out, errors = inspect(capsys, *(argument.format(archive=archive) for argument in arguments))
    assert (code, out) == (2, "")
    assert errors.startswith(message.format(archive=archive))
    assert "Traceback" not in errors


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "m.csv").write_text('file_name,label\na.jpg,"\x1b[31mred\nants 9"\n"\x1b]0;x\x07.tar",\n')
    (tmp_path / "\x1b[2J.tar").write_bytes(b"damaged" * 100)
    out = inspect(capsys, tmp_path, tmp_path / "m.csv")[1]
    assert out.replace("\n", "").isprintable()
    assert r"\x1b[31mred\nants 9 1" in out


def test_names_that_are_no_text_can_be_printed(tmp_path, capsys):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).touch()
    (tmp_path / "m.csv").write_bytes(b"file_name,label\ncaf\xe9.jpg,caf\xe9\n")
    assert inspect(capsys, tmp_path / "m.csv")[0] == 0
    assert json.loads(inspect(capsys, tmp_path / "m.csv", "--json")[1])["labels"] == {"caf\ufffd": 1}


def test_inspecting_imports_neither_torch_nor_ray(archive):
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print({'torch', 'torchvision', 'ray', 'datasets'} & set(sys.modules)))\n"
        "from jobs.__main__ import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "inspect", str(archive)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("images   21: ")
    assert result.stdout.endswith("\nset()\n")


def test_command_line_knows_inspect():
    command = [sys.executable, "-m", "jobs.inspect", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "nightshift inspect" in result.stdout
