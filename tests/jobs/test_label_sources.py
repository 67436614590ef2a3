"""`label` on everything that people keep images in: the same labels, the targets that came along, each image once.

pytest tests/jobs/test_label_sources.py
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.label import LabelConfig, run
from pipeline.errors import ConfigError, NoImagesError, OutputError, StorageError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage
from pipeline.storage import open_folder

TOLERANCE = 1e-4


def write_tar(path: Path, images: list[str], *, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for image in images:
            archive.add(image, arcname=os.path.basename(image))


def write_zst(path: Path, images: list[str]) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for image in images:
            archive.add(image, arcname=os.path.basename(image))
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(plain.getvalue())


def write_webdataset(path: Path, images: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images):
            archive.add(image, arcname=os.path.basename(image))
            label = tarfile.TarInfo(f"{Path(image).stem}.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(str(number % 10).encode()))


def write_zip(path: Path, images: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(images):
            kind = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.write(image, os.path.basename(image), compress_type=kind)


def write_parquet(path: Path, images: list[str], *, rows_per_group: int = 8) -> None:
    cells = [{"bytes": Path(image).read_bytes(), "path": os.path.basename(image)} for image in images]
    labels = [number % 10 for number in range(len(images))]
    pq.write_table(pa.table({"image": cells, "label": labels}), path, row_group_size=rows_per_group)


def write_csv(path: Path, images: list[str]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label"])
        table.writerows((os.path.relpath(image, path.parent), number % 10) for number, image in enumerate(images))


@pytest.fixture(scope="module")
def archives(tmp_path_factory, make_images) -> Path:
    """The same 20 pictures as a folder, tars, a zip, a Parquet file and a manifest."""
    root = tmp_path_factory.mktemp("archives")
    images = make_images(root / "pictures", 20)
    kept = root / "kept"
    kept.mkdir()
    write_tar(kept / "plain.tar", images)
    write_webdataset(kept / "dataset.tar", images)
    write_tar(kept / "packed.tar.gz", images, mode="w:gz")
    write_zst(kept / "packed.tar.zst", images)
    write_zip(kept / "dump.zip", images)
    write_parquet(kept / "table.parquet", images)
    # The same pictures again, since each is labelled once by its name.
    write_csv(root / "list.csv", make_images(root / "listed", 20))
    return root


@pytest.fixture
def config(tiny_model_dir, tmp_path, ray_cluster) -> LabelConfig:
    return LabelConfig(
        output=str(tmp_path / "out"), model=tiny_model_dir, precision="fp32", num_workers="1", quiet=True
    )


def read_rows(result) -> list[dict]:
    return result.dataset().to_table().to_pylist()


def test_every_kind_of_source_gives_the_labels_of_the_folder_and_its_targets(archives, config):
    inputs = ("pictures", "kept", "list.csv")
    result = run(replace(config, inputs=tuple(str(archives / name) for name in inputs), shard_size=16))
    rows = read_rows(result)
    assert result.account["counts"] == {"listed": 160, "labelled": 160, "failed": 0}
    assert len({row["uri"] for row in rows}) == 160

    expected = {
        os.path.basename(row["uri"]): row for row in rows if os.path.dirname(row["uri"]) == f"{archives}/pictures"
    }
    fetcher = Fetcher(retries=0)
    for row in rows:
        content, _ = fetcher.read(ListedImage(row["uri"]))  # its URI alone leads to the same bytes
        assert len(content) == row["size_bytes"]
        name = next(name for name in expected if Path(archives, "pictures", name).read_bytes() == content)
        assert row["label"] == expected[name]["label"]
        assert row["score"] == pytest.approx(expected[name]["score"], abs=TOLERANCE)
        carries = ("dataset.tar", "table.parquet", "/listed/")
        is_labelled = any(part in row["uri"] for part in carries)
        assert row["target"] == (str(int(Path(name).stem) % 10) if is_labelled else None)


def test_broken_and_hostile_members_are_rows_and_nothing_leaves_the_archive(archives, config, tmp_path):
    """As a camera dump, a web crawl or an attacker may have left them."""
    images = sorted(map(str, (archives / "pictures").iterdir()))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    names = [
        "../../escape.jpg",
        "/etc/absolute.jpg",
        "line\nfeed\x07.jpg",
        f"{'long' * 2500}.jpg",
        "twice.jpg",
        "twice.jpg",
    ]
    with tarfile.open(inputs / "names.tar", "w") as archive:
        for name, image in zip(names, images, strict=False):
            member = tarfile.TarInfo(name)
            member.size = os.path.getsize(image)
            with open(image, "rb") as file:
                archive.addfile(member, file)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    write_tar(inputs / "cut.tar", images)
    cut = os.path.getsize(inputs / "cut.tar") // 2
    with tarfile.open(inputs / "cut.tar") as archive:
        num_whole = sum(member.offset_data + member.size <= cut for member in archive)
    os.truncate(inputs / "cut.tar", cut)
    write_tar(inputs / "cut.tar.gz", images, mode="w:gz")
    os.truncate(inputs / "cut.tar.gz", os.path.getsize(inputs / "cut.tar.gz") // 2)
    with zipfile.ZipFile(inputs / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(50_000_000))
        archive.write(images[0], "fine.jpg")
    (inputs / "no.zip").write_bytes(b"no archive at all")
    write_parquet(inputs / "cut.parquet", images)
    os.truncate(inputs / "cut.parquet", os.path.getsize(inputs / "cut.parquet") - 20)

    result = run(replace(config, inputs=(str(inputs),), max_failure_rate=1))
    rows = {row["uri"].removeprefix("tar://"): row for row in read_rows(result)}
    failed = {os.path.basename(uri): row for uri, row in rows.items() if row["error"]}
    assert {name: row["error"].split(":")[0] for name, row in failed.items()} == {
        "cut.tar": "DamagedArchive",
        "cut.tar.gz": "DamagedArchive",
        "bomb.zip": "ZipBomb",
        "no.zip": "BadZipFile",
        "cut.parquet": "BadParquet",
    }
    assert all(row["error_stage"] == "list" for row in failed.values())
    assert re.search(r"ends within .* at byte [\d,]+$", failed["cut.tar"]["error"])
    assert sum(uri.endswith("::" + str(inputs / "cut.tar")) for uri in rows) == num_whole
    labelled = [uri for uri, row in rows.items() if uri.endswith("names.tar") and row["label"]]
    assert len(labelled) == len(names)
    assert sum("twice.jpg#offset=" in uri for uri in labelled) == 1
    assert not (tmp_path / "escape.jpg").exists()
    assert sorted(os.listdir(inputs)) == ["bomb.zip", "cut.parquet", "cut.tar", "cut.tar.gz", "names.tar", "no.zip"]


@pytest.mark.slow
def test_decoding_on_other_nodes_reads_archives_alike(archives, config, tmp_path):
    inputs = (str(archives / "kept"),)
    fused = run(replace(config, inputs=inputs))
    split = run(replace(config, inputs=inputs, output=str(tmp_path / "split"), decode_on="cpu-nodes"))
    key = lambda row: row["uri"]  # noqa: E731
    for mine, theirs in zip(sorted(read_rows(fused), key=key), sorted(read_rows(split), key=key), strict=True):
        assert (mine["uri"], mine["label"], mine["target"]) == (theirs["uri"], theirs["label"], theirs["target"])
    many = tmp_path / "many.tar.gz"
    write_tar(many, [str(archives / "pictures" / "00000.jpg")] * 2049, mode="w:gz")
    with pytest.raises(ConfigError, match=r"a shard of this run holds 2,049 images"):
        run(replace(config, inputs=(str(many),), output=str(tmp_path / "large"), decode_on="cpu-nodes"))


@pytest.mark.slow
def test_real_tar_gives_every_member_a_row_with_its_target(shared_data, config):
    result = run(replace(config, inputs=(str(shared_data / "cifar10" / "test-00000.tar"),)))
    rows = result.dataset().to_table(columns=["uri", "target", "error"]).to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows) == 10_000
    assert [row["error"] for row in rows if row["error"]] == []
    assert {target: sum(row["target"] == target for row in rows) for target in "0123456789"} == dict.fromkeys(
        "0123456789", 1_000
    )


# ---------------------------------------------------------------------------------------------------------------
# An archive that grows


@pytest.mark.slow
def test_update_labels_only_what_is_new_and_leaves_the_other_parts_alone(make_images, config, tmp_path):
    inputs = tmp_path / "inputs"
    write_tar_of = lambda name, seed: write_tar(  # noqa: E731
        inputs / name, make_images(tmp_path / name.removesuffix(".tar"), 70, seed=seed)
    )
    inputs.mkdir()
    write_tar_of("monday.tar", 1)
    config = replace(config, inputs=(str(inputs),), update=True)
    first = run(config)
    assert first.account["counts"]["listed"] == 70
    before = {part.name: part.stat().st_mtime_ns for part in Path(first.predictions).iterdir()}

    nothing_new = run(config)
    assert nothing_new.account["invocations"][-1]["images"] == 0
    assert nothing_new.account["state"] == "done"

    write_tar_of("tuesday.tar", 2)
    second = run(config)
    assert second.account["counts"] == {"listed": 140, "labelled": 140, "failed": 0}
    assert second.account["run_id"] == first.account["run_id"]
    assert second.account["invocations"][-1]["images"] == 70
    after = {part.name: part.stat().st_mtime_ns for part in Path(first.predictions).iterdir()}
    assert before.items() < after.items()
    uris = [row["uri"] for row in read_rows(second)]
    assert len(uris) == len(set(uris)) == 140

    # Stopped within the update: the parts of both segments count, and the plain command completes it.
    newest = max(set(after) - set(before))
    Path(first.predictions, newest).unlink()
    Path(second.output, "_SUCCESS").unlink()
    third = run(replace(config, update=False))
    assert third.account["counts"] == second.account["counts"]
    assert {part.name for part in Path(first.predictions).iterdir()} == set(after)


def test_update_refuses_other_settings_and_keeps_what_it_found(archives, config):
    config = replace(config, inputs=(str(archives / "kept" / "plain.tar"),))
    run(config)
    with pytest.raises(OutputError, match="--top-k: auto then, 3 now"):
        run(replace(config, update=True, top_k=3))
    for change in ({"overwrite": True}, {"limit": 3}):
        with pytest.raises(ConfigError, match="--update: cannot be used with"):
            run(replace(config, update=True, **change))


# ---------------------------------------------------------------------------------------------------------------
# From a bucket, into a bucket


def upload(folder: Path, put_object) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            put_object(str(path.relative_to(folder.parent)), path.read_bytes())


@pytest.mark.slow
def test_bucket_is_labelled_into_a_bucket_whatever_the_network_does(archives, config, bucket, put_object, faulty_s3):
    """Every kind of source in one bucket, throttled and cut off now and then, resumed and updated there."""
    upload(archives / "pictures", put_object)
    upload(archives / "kept", put_object)
    names = "\n".join(f"../pictures/{number:05d}.jpg" for number in range(20))
    put_object("lists/list.txt", names.encode())
    faulty_s3.slow_down(method="GET", path="/pictures/00003", times=2)
    faulty_s3.cut_body(method="GET", path="/pictures/00005", times=1)
    faulty_s3.slow_down(method="GET", path="/kept/dump.zip", skip=3, times=2)
    faulty_s3.cut(method="GET", path="list-type=2", times=1)
    faulty_s3.slow_down(method="PUT", path="/out/predictions", times=2)

    root = f"s3://{bucket}"
    inputs = (f"{root}/pictures", f"{root}/kept", f"{root}/lists/list.txt")
    config = replace(config, inputs=inputs, output=f"{root}/out", shard_size=16, target="folder")
    result = run(config)
    rows = {row["uri"]: row for row in read_rows(result)}
    assert result.account["counts"] == {"listed": 140, "labelled": 140, "failed": 0}
    assert len(rows) == result.dataset().count_rows() == 140
    assert rows[f"{root}/pictures/00003.jpg"]["attempts"] == 3
    assert rows[f"{root}/pictures/00005.jpg"]["attempts"] == 2
    assert rows[f"{root}/pictures/00007.jpg"]["target"] == "pictures"
    assert rows[f"tar://00007.jpg::{root}/kept/dataset.tar"]["target"] == "7"
    local = Fetcher(retries=0)
    for uri, row in rows.items():
        content, _ = local.read(ListedImage(uri))
        assert len(content) == row["size_bytes"]

    # What is done is found again, what is missing is redone, what is new is added, what is not ours is refused.
    folder = open_folder(config.output, scratch="_nightshift/tmp")
    first, *others = folder.list_names("predictions")
    folder.delete(f"predictions/{first}")
    folder.delete("_SUCCESS")
    again = run(config)
    assert folder.list_names("predictions") == [first, *others]
    assert 0 < again.account["invocations"][-1]["images"] <= 20
    put_object("pictures/later.jpg", (archives / "pictures" / "00000.jpg").read_bytes())
    assert run(replace(config, update=True)).account["counts"]["listed"] == 141
    assert run(config).account["state"] == "done"
    with pytest.raises(OutputError, match="is not empty and no nightshift run"):
        run(replace(config, output=f"{root}/kept"))
    with pytest.raises(OutputError, match="there is no s3://no-such-bucket"):
        run(replace(config, output="s3://no-such-bucket/out"))


def test_store_that_refuses_is_one_clear_error_and_no_plan(config, bucket, put_object, faulty_s3, tmp_path):
    put_object("pictures/00000.jpg", b"")
    faulty_s3.slow_down(path="max-keys=1000.*pictures", times=2)
    with pytest.raises(StorageError, match=f"cannot list s3://{bucket}/pictures: SlowDown"):
        run(replace(config, inputs=(f"s3://{bucket}/pictures",), retries=1))
    assert not Path(config.output, "_nightshift", "plan").exists()
    with pytest.raises(NoImagesError, match=f"'s3://{bucket}/nothing' does not exist"):
        run(replace(config, inputs=(f"s3://{bucket}/nothing",)))
    with pytest.raises(NoImagesError, match=r"there are 1 \.jpg that the pattern does not match"):
        run(replace(config, inputs=(f"s3://{bucket}/*/*.png",), retries=0))


# ---------------------------------------------------------------------------------------------------------------
# Killed in the middle

GATED_MODEL = """
import time, torch
from pathlib import Path

FOLDER = Path("{folder}")

class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 7))

    def forward(self, images):
        with open(FOLDER / "batches", "a") as file:
            file.write(".")
        while (FOLDER / "batches").stat().st_size > int((FOLDER / "gate").read_text()):
            (FOLDER / "reached").touch()
            time.sleep(0.1)
        return self.layers(images)

def make():
    torch.manual_seed(0)
    return Gated()
"""


@pytest.mark.slow
def test_run_killed_in_the_middle_of_every_archive_gives_each_image_once(make_images, tmp_path):
    """The model stops at a gate in the middle of the work, the driver is killed there, and the command is repeated."""
    images = make_images(tmp_path / "pictures", 56)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    # In this order the two that are one shard each come last.
    write_zip(inputs / "a.zip", images)
    write_tar(inputs / "b.tar.gz", images[:48], mode="w:gz")
    write_tar(inputs / "c.tar", images[:48])
    write_zst(inputs / "d.tar.zst", images[:48])
    write_parquet(inputs / "e.parquet", images[:40])
    (tmp_path / "gated.py").write_text(GATED_MODEL.format(folder=tmp_path))
    command = "label inputs -o out --model gated:make --shard-size 8 --batch-size 8 --num-workers 1".split()
    parts = tmp_path / "out" / "predictions"

    def kill_at(num_batches: int) -> dict[str, int]:
        """Run until so many batches were predicted, and say how many images of each archive were done by then."""
        (tmp_path / "gate").write_text(str(num_batches))
        (tmp_path / "reached").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *command], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not (tmp_path / "reached").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)  # a file of another process: there is no event to wait for
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        done = [row["uri"].partition("#row=")[0] for row in pq.read_table(parts).to_pylist()]
        return {name: sum(uri.endswith(name) for uri in done) for name in sorted(os.listdir(inputs))}

    done = kill_at(9)
    assert 0 < done["a.zip"] < 56, done
    assert 0 < done["c.tar"] < 48, done
    assert 0 < done["e.parquet"] < 40, done
    done = kill_at(9 + 11 + 3)
    assert done["b.tar.gz"] * done["d.tar.zst"] == 0, done  # a compressed tar is done as a whole or not at all

    (tmp_path / "gate").write_text("1000")
    again = subprocess.run(
        [sys.executable, "-m", "jobs", *command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["counts"] == {"listed": 240, "labelled": 240, "failed": 0}
    uris = pq.read_table(parts)["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == 240
