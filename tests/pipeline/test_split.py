"""Labelled images become two sets that a training can rely on; what stands in its way is told at once."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import DENIED
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reading import fetch_all
from torchvision.datasets.folder import find_classes

from pipeline import schema
from pipeline.errors import ConfigError, StorageError
from pipeline.listing import Inputs
from pipeline.model_dir import read_labels
from pipeline.plan import PLAN_DIR
from pipeline.sources import ListedImage, ListingOptions, Selection
from pipeline.split import Split, find_sets, read_examples, read_unlisted, split_images, to_images, write_split
from pipeline.storage import open_folder
from pipeline.storage.uri import path_to_uri


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"file {name}".encode())


def write_tar(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in contents.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def write_labelled_tar(path: Path, labels: list[str]) -> None:
    members = {}
    for number, label in enumerate(labels):
        members |= {f"{number:03d}.jpg": b"%d" % number, f"{number:03d}.cls": label.encode()}
    write_tar(path, members)


def write_parquet(path: Path, labels: list, *, names: list[str] | None = None, **options) -> None:
    table = pa.table({"image": [b"%d" % number for number in range(len(labels))], "label": labels})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, **options)


def write_manifest(path: Path, targets: dict[str, str]) -> None:
    """Images that lie elsewhere, by the last parts of their URIs."""
    path.write_text(
        "".join(json.dumps({"uri": f"s3://b/{name}", "label": target}) + "\n" for name, target in targets.items())
    )


def split(train, val=None, *, val_fraction: float = 0.0, target="folder", **options) -> tuple[Split, list[str]]:
    options = ListingOptions(target=target, retries=0, **options)
    inputs = [
        None if one is None else Inputs(tuple(map(str, one if isinstance(one, tuple) else (one,))), options=options)
        for one in (train, val)
    ]
    notices: list[str] = []
    return split_images(*inputs, val_fraction=val_fraction, notice=notices.append), notices


def find_faults(train, val=None, **options) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        split(train, val, **options)
    return error.value.faults


def labels(found: Split, name: str = "train") -> dict[str, str]:
    """The category of each image of a set."""
    table = getattr(found, name)
    return dict(
        zip(table["uri"].to_pylist(), map(found.categories.__getitem__, table["label_id"].to_pylist()), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------
# Which inputs are for what


def sets(*given: object, val: tuple[str, ...] = ()) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[str]]:
    notices: list[str] = []
    train, validate = find_sets(tuple(map(str, given)), val=val, retries=0, notice=notices.append)
    return train, validate, notices


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folder_with_train_and_validation_folders_stands_for_both(tmp_path, name):
    write_files(tmp_path, "train/a/1.jpg", f"{name}/a/1.jpg")
    assert sets(tmp_path) == ((f"{tmp_path}/train",), (f"{tmp_path}/{name}",), [])
    assert sets(f"{tmp_path}/") == sets(tmp_path)


def test_bucket_with_train_and_validation_folders_stands_for_both(bucket, put_object):
    for key in ("in/train/a/1.jpg", "in/val/a/1.jpg", "in/test/a/1.jpg", "train/a.jpg", "valid/a.jpg"):
        put_object(key)
    train, val, notices = sets(f"s3://{bucket}/in/")
    assert (train, val) == ((f"s3://{bucket}/in/train",), (f"s3://{bucket}/in/val",))
    assert len(notices) == 1 and "/in/test is left alone" in notices[0]
    assert sets(f"s3://{bucket}") == ((f"s3://{bucket}/train",), (f"s3://{bucket}/valid",), [])


def test_folders_are_found_whatever_the_name_above_them(tmp_path, monkeypatch):
    for name in ("50%", "a{b,c}", "[x]*", "a#row=1"):
        write_files(tmp_path / name, "train/a/1.jpg", "val/a/1.jpg")
        train, val, _ = sets(tmp_path / name)
        (image,) = Inputs(val, options=ListingOptions()).list_images()
        assert (train, image.uri) == ((f"{tmp_path}/{name}/train",), path_to_uri(f"{tmp_path}/{name}/val/a/1.jpg"))
    monkeypatch.chdir(tmp_path / "50%")
    assert sets(".")[:2] == (("./train",), ("./val",))
    assert sets(f"file://{tmp_path}/50%25")[1] == (f"file://{tmp_path}/50%25/val",)


def test_test_folder_is_left_alone_with_a_word(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "test/a/1.jpg")
    train, val, (notice,) = sets(tmp_path)
    assert (train, val) == ((f"{tmp_path}/train",), (f"{tmp_path}/val",))
    assert f"{tmp_path}/test is left alone" in notice


def test_test_folder_is_not_taken_for_validation_and_what_the_error_proposes_works(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "test/a/1.jpg")
    with pytest.raises(ConfigError, match=f"'train' and 'test'.* with --val, or give {tmp_path}/train alone"):
        sets(tmp_path)
    assert sets(tmp_path, val=(f"{tmp_path}/test/",)) == ((f"{tmp_path}/train",), (f"{tmp_path}/test/",), [])
    assert sets(f"{tmp_path}/train") == ((f"{tmp_path}/train",), None, [])


def test_train_folder_alone_is_trained_on(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", ".cache/1.jpg", "notes.md")
    assert sets(tmp_path) == ((f"{tmp_path}/train",), None, [])


def test_train_folder_that_may_be_a_class_is_told_and_the_way_around_it_works(tmp_path):
    write_files(tmp_path, "bus/1.jpg", "train/1.jpg", "val.txt")
    train, val, (notice,) = sets(tmp_path)
    assert (train, val) == ((f"{tmp_path}/train",), None)
    assert f"not on 'bus' beside it; if all of them are classes, give '{tmp_path}/*'" in notice
    assert sets(f"{tmp_path}/*") == ((f"{tmp_path}/*",), None, [])
    assert split(f"{tmp_path}/*")[0].categories == ("bus", "train")


def test_folders_of_a_bucket_beside_the_train_folder_are_told(bucket, put_object):
    for key in ("train/1.jpg", "bus/1.jpg", ".git/1.jpg", "//1.jpg"):
        put_object(key)
    _, _, (notice,) = sets(f"s3://{bucket}")
    assert "not on 'bus' beside it" in notice


def test_inputs_without_a_train_folder_are_taken_as_they_are(tmp_path, monkeypatch):
    write_files(tmp_path, "a/1.jpg", "val/2.jpg", "train", "b/train/1.jpg", "b/val/1.jpg")
    write_tar(tmp_path / "x.tar", {"train/1.jpg": b"", "val/2.jpg": b""})
    monkeypatch.chdir(tmp_path)
    for inputs in [(tmp_path,), ("a",), ("x.tar",), ("a", "b"), ("?",), ("{a,b}",), ("missing",), ("",), ("/",), ()]:
        assert sets(*inputs) == (tuple(map(str, inputs)), None, [])
    assert sets("https://example.org/data") == (("https://example.org/data",), None, [])
    assert sets("a", val=("b",)) == (("a",), ("b",), [])


def test_two_validation_folders_have_to_be_told_apart(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg")
    with pytest.raises(ConfigError, match=r"has the folders 'val', 'valid': name the one to validate on with --val"):
        sets(tmp_path)
    train, val, (notice,) = sets(tmp_path, val=(f"{tmp_path}/valid",))
    assert (train, val) == ((f"{tmp_path}/train",), (f"{tmp_path}/valid",))
    assert f"{tmp_path}/val is left alone" in notice


def test_store_that_refuses_is_not_taken_for_a_folder_without_sets(faulty_s3, bucket, put_object, waits):
    put_object("in/train/a/1.jpg")
    faulty_s3.answer(403, DENIED, path=r"in%2Fval|in/val")
    with pytest.raises(StorageError, match=r"cannot read s3://.*/in/val"):
        sets(f"s3://{bucket}/in")


# ---------------------------------------------------------------------------------------------------------------
# Categories


def test_folders_become_the_classes_that_torchvision_finds(tmp_path):
    names = ["B", "a", "é", "10", "9", "b c", "ab", "_", "a-b"]
    write_files(tmp_path, *(f"{name}/{number}.jpg" for name in names for number in range(2)))
    found, notices = split(tmp_path)
    assert list(found.categories) == find_classes(tmp_path)[0]
    assert labels(found) == {path_to_uri(f"{tmp_path}/{name}/{n}.jpg"): name for name in names for n in range(2)}
    assert notices == []


@given(numbers=st.sets(st.integers(-30, 3000), min_size=2))
@settings(max_examples=30)
def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("numbers") / "m.jsonl"
    write_manifest(path, {f"{number}.jpg": str(number) for number in numbers})
    assert split(path)[0].categories == tuple(map(str, sorted(numbers)))


def test_one_class_that_is_no_number_makes_all_of_them_text(tmp_path):
    write_labelled_tar(tmp_path / "x.tar", ["10", "9", "9a", "100"])
    assert split(tmp_path / "x.tar")[0].categories == ("10", "100", "9", "9a")


def test_numbers_of_any_length_are_sorted(tmp_path):
    write_manifest(tmp_path / "m.jsonl", {"1.jpg": "9" * 5000, "2.jpg": "10"})
    assert split(tmp_path / "m.jsonl")[0].categories == ("10", "9" * 5000)


names = st.text(st.sampled_from("ab \t\u2003ü\u2028\x85\r\n\x1f1"), min_size=1, max_size=4)


@given(names=st.lists(names, min_size=2, max_size=6, unique=True))
@example(names=["a\nb", "a"])
@example(names=["a\rb", "a"])
@example(names=[" a", "b\n"])
def test_categories_come_back_from_a_file_with_one_a_line(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    write_manifest(folder / "m.jsonl", {f"{number}.jpg": name for number, name in enumerate(names)})
    stripped = [name.strip() for name in names]
    assume(len({name for name in stripped if name}) > 1)
    if any(len(name.splitlines()) > 1 for name in stripped):
        assert "line breaks" in find_faults(folder / "m.jsonl")[0]
        return
    found, _ = split(folder / "m.jsonl")
    (folder / "labels.txt").write_text("\n".join(found.categories) + "\n")
    assert read_labels(folder / "labels.txt") == found.categories
    assert labels(found) == {f"s3://b/{number}.jpg": name for number, name in enumerate(stripped) if name}
    assert found.train["target"].to_pylist() == [name for name in stripped if name]


def test_class_labels_keep_their_order_and_ids(tmp_path):
    write_parquet(tmp_path / "0.parquet", [1, 0, 2], names=["wasp", "ant ", "bee"])
    write_parquet(tmp_path / "1.parquet", [2, 1, -1], names=["wasp", "ant ", "bee"])
    found, notices = split(tmp_path)
    assert found.categories == ("wasp", "ant", "bee")
    assert found.train["label_id"].to_pylist() == [1, 0, 2, 2, 1]
    assert len(notices) == 1 and "1 images to train on are left out: they have no label" in notices[0]


def test_class_labels_that_disagree_are_sorted_instead(tmp_path):
    write_parquet(tmp_path / "0.parquet", [0, 1], names=["wasp", "ant"])
    write_parquet(tmp_path / "1.parquet", [0, 1], names=["ant", "wasp"])
    found, (notice,) = split(tmp_path)
    assert found.categories == ("ant", "wasp")
    assert found.train["label_id"].to_pylist() == [1, 0, 0, 1]
    assert "in different orders" in notice


def test_labels_beyond_those_of_a_table_are_sorted_with_them(tmp_path):
    write_parquet(tmp_path / "0.parquet", [0, 1], names=["wasp", "ant"])
    write_files(tmp_path, "bee/1.jpg")
    found, (notice,) = split(tmp_path)
    assert found.categories == ("ant", "bee", "wasp")
    assert "not among the classes of a table, 'bee'" in notice


def test_class_names_of_the_validation_set_do_not_matter(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1], names=["wasp", "ant"])
    write_parquet(tmp_path / "val.parquet", [0, 1], names=["ant", "wasp"])
    found, notices = split(tmp_path / "train.parquet", tmp_path / "val.parquet")
    assert found.categories == ("wasp", "ant")
    assert found.val["label_id"].to_pylist() == [1, 0]
    assert notices == []


def test_classes_of_a_table_without_an_image_are_an_error(tmp_path):
    write_parquet(tmp_path / "x.parquet", [0, 1], names=[*"abcdefghij"])
    (fault,) = find_faults(tmp_path / "x.parquet")
    assert fault == "8 of 10 classes have no image to train on: 'c', 'd', 'e', 'f', 'g' and 3 more"


def test_single_class_is_an_error(tmp_path):
    write_files(tmp_path, "train/1.jpg", "train/2.jpg")
    (fault,) = find_faults(tmp_path / "train")
    assert "of one class, 'train'" in fault


# ---------------------------------------------------------------------------------------------------------------
# Images without a label, and entries that are no images


def test_images_without_a_label_are_left_out_with_a_word(tmp_path):
    write_files(tmp_path, *(f"{number}.jpg" for number in range(5)))
    (tmp_path / "m.csv").write_text("file_name,label\n0.jpg,a\n1.jpg,\n2.jpg,b\n3.jpg,  \n4.jpg,a\n")
    found, (notice,) = split(tmp_path / "m.csv", target="none")
    assert labels(found) == {f"{tmp_path}/0.jpg": "a", f"{tmp_path}/2.jpg": "b", f"{tmp_path}/4.jpg": "a"}
    assert notice == f"2 images to train on are left out: they have no label, such as {tmp_path}/1.jpg"


def test_images_of_which_none_has_a_label_are_an_error_that_says_how_to_label_them(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    faults = find_faults(tmp_path / "train", tmp_path / "val", target="none")
    assert f"none of the 2 images to train on has a label, such as {tmp_path}/train/a/1.jpg" in faults[0]
    assert "none of the 1 images to validate on has a label" in faults[1]
    assert all(word in faults[0] for word in ("--target folder", "--label-column", ".cls"))


def test_what_cannot_be_listed_is_kept_with_the_reason(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    (tmp_path / "train/b/2.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "val/x.tar").symlink_to("nowhere.tar")
    found, _ = split(tmp_path / "train", tmp_path / "val")
    assert (len(found.train), len(found.val)) == (2, 2)
    assert found.unlisted.schema.equals(schema.UNUSABLE)
    assert found.unlisted["uri"].to_pylist() == [f"{tmp_path}/train/b/2.tar", f"{tmp_path}/val/x.tar"]
    assert found.unlisted["error_stage"].to_pylist() == ["list", "list"]
    kinds = [error.partition(":")[0] for error in found.unlisted["error"].to_pylist()]
    assert kinds == ["DamagedArchive", "FileNotFoundError"]


def test_reasons_are_cut_as_elsewhere(faulty_s3, bucket, put_object):
    for key in ("a/1.jpg", "b/1.jpg", f"b/{'x' * 600}.tar"):
        put_object(key)
    faulty_s3.answer(403, DENIED, path="xxx")
    found, _ = split(f"s3://{bucket}")
    (error,) = found.unlisted["error"].to_pylist()
    assert "xxx" in error and len(error) == schema.MAX_ERROR_CHARS


def test_set_of_which_nothing_can_be_listed_is_an_error(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    (fault,) = find_faults(tmp_path / "train", tmp_path / "x.tar")
    assert fault.startswith(f"nothing to validate on can be read, such as {tmp_path}/x.tar: DamagedArchive")


def test_empty_sets_are_errors(tmp_path):
    write_files(tmp_path, "full/a/1.jpg", "full/b/1.jpg", "empty/notes.md", "void/notes.txt")
    assert "found no images in" in find_faults(tmp_path / "full", tmp_path / "empty")[0]
    both = find_faults(tmp_path / "empty", tmp_path / "void")
    assert [fault.partition(" (")[0].rpartition("/")[2] for fault in both] == ["empty'", "void'"]


def test_all_faults_are_told_at_once(tmp_path):
    write_files(tmp_path, "train/a\nb/1.jpg", "val/c/1.jpg")
    (tmp_path / "train/wasps").mkdir()
    faults = find_faults(tmp_path / "train", tmp_path / "val")
    assert [word in fault for word, fault in zip(("line breaks", "one class", "wasps", "'c'"), faults, strict=True)]
    assert len(faults) == 4


# ---------------------------------------------------------------------------------------------------------------
# A validation set of its own


def test_validation_labels_are_matched_by_name(tmp_path):
    write_files(tmp_path, "train/bee/1.jpg", "train/ant/1.jpg", "val/bee/1.jpg", "val/bee/2.jpg", "val/ant/1.jpg")
    found, notices = split(tmp_path / "train", tmp_path / "val", val_fraction=0.5)
    assert (found.categories, notices) == (("ant", "bee"), [])
    assert found.val["label_id"].to_pylist() == [0, 1, 1]
    assert len(found.train) == 2


def test_validation_labels_that_are_numbers_are_class_ids_where_no_class_is_called_so(tmp_path):
    write_files(tmp_path, "train/bee/1.jpg", "train/ant/1.jpg", "train/cat/1.jpg")
    write_labelled_tar(tmp_path / "val.tar", ["2", "0", "01"])
    found, (notice,) = split(tmp_path / "train", tmp_path / "val.tar")
    assert found.val["label_id"].to_pylist() == [2, 0, 1]
    assert found.val["target"].to_pylist() == ["2", "0", "01"]
    assert "taken for their ids: 0 is 'ant', 2 is 'cat'" in notice


@pytest.mark.parametrize(
    "classes, val, foreign",
    [
        (["ant", "bee"], ["0", "2"], "'0', '2'"),  # beyond the last id
        (["ant", "bee"], ["0", "-1"], "'0', '-1'"),
        (["ant", "bee"], ["0", "bee"], "'0'"),  # one is a name, so the others are as well
        (["ant", "bee"], ["0", "x"], "'0', 'x'"),
        (["ant", "bee"], ["²", "0"], "'²', '0'"),
        (["1", "ant"], ["0", "1"], "'0'"),
        (["1", "2"], ["0", "0"], "'0'"),  # classes that are numbers are named by them
    ],
)
def test_class_that_only_the_validation_set_has_is_an_error(tmp_path, classes, val, foreign):
    write_files(tmp_path, *(f"train/{name}/1.jpg" for name in classes))
    write_labelled_tar(tmp_path / "val.tar", val)
    (fault,) = find_faults(tmp_path / "train", tmp_path / "val.tar")
    assert f"to validate on, and not to train on: {foreign} (the first one with tar://000.jpg::{tmp_path}" in fault


def test_long_list_of_classes_is_cut(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", *(f"val/x{number}/1.jpg" for number in range(8)))
    (fault,) = find_faults(tmp_path / "train", tmp_path / "val")
    assert "'x0', 'x1', 'x2', 'x3', 'x4' and 3 more (the first one with" in fault


def test_class_that_the_validation_set_lacks_is_worth_a_word(tmp_path):
    write_files(tmp_path, "train/bee/1.jpg", "train/ant/1.jpg", "train/cat/1.jpg", "val/ant/1.jpg")
    found, (notice,) = split(tmp_path / "train", tmp_path / "val")
    assert len(found.val) == 1
    assert notice == "2 of 3 classes have no image to validate on: 'bee', 'cat'"


def test_images_in_both_sets_are_worth_a_word(tmp_path):
    write_files(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    _, (notice,) = split(tmp_path, (f"{tmp_path}/a/1.jpg", f"{tmp_path}/b"))
    assert "2 images are both trained on and validated on" in notice


# ---------------------------------------------------------------------------------------------------------------
# A fraction for validation

trees = st.dictionaries(st.integers(0, 500), st.sampled_from("abcd"), min_size=4, max_size=60)


def split_manifest(folder: Path, targets: dict[int, str], fraction: float) -> tuple[dict[str, str], dict[str, str]]:
    """Which images are trained on and which validated on, with their labels."""
    write_manifest(folder / "m.jsonl", {f"{number}.jpg": target for number, target in targets.items()})
    found, _ = split(folder / "m.jsonl", val_fraction=fraction)
    return labels(found), labels(found, "val")


@given(targets=trees, fraction=st.sampled_from([0.001, 0.1, 0.5, 0.9, 0.999]))
@example(targets={1: "a", 2: "a", 3: "b"}, fraction=0.001)
@example(targets={1: "a", 2: "a", 3: "b"}, fraction=0.999)
def test_every_image_is_in_one_set_and_every_class_of_two_images_in_both(tmp_path_factory, targets, fraction):
    counts = {name: list(targets.values()).count(name) for name in targets.values()}
    assume(len(counts) > 1 and max(counts.values()) > 1)
    train, val = split_manifest(tmp_path_factory.mktemp("split"), targets, fraction)
    assert train.keys().isdisjoint(val)
    assert train | val == {f"s3://b/{number}.jpg": target for number, target in targets.items()}
    assert set(train.values()) == counts.keys()
    assert set(val.values()) == {name for name, count in counts.items() if count > 1}


@given(targets=trees, more=trees, fraction=st.sampled_from([0.2, 0.5]))
def test_images_stay_on_their_side_when_others_are_added(tmp_path_factory, targets, more, fraction):
    folder = tmp_path_factory.mktemp("split")
    targets |= {1000 + number: "e" for number in range(2)}  # so that there are two classes, and something to validate
    before, after = (split_manifest(folder, some, fraction) for some in (targets, more | targets))
    moved = [(before[0].keys() & after[1].keys()), (before[1].keys() & after[0].keys())]
    # At most one of each class was on the other side because it was the best that there was.
    for uris, labelled in zip(moved, before, strict=True):
        assert all([labelled[uri] for uri in uris].count(name) <= 1 for name in "abcde")


def test_image_that_nothing_forces_to_move_never_does(tmp_path):
    first = {number: "ab"[number % 2] for number in range(200)}
    second = first | {number: "abc"[number % 3] for number in range(200, 400)}
    before, after = (split_manifest(tmp_path, targets, 0.3) for targets in (first, second))
    assert before[0].keys() <= after[0].keys()
    assert before[1].keys() <= after[1].keys()


def test_larger_fraction_only_adds_to_the_validation_set(tmp_path):
    targets = {number: "ab"[number % 2] for number in range(200)}
    fractions = (1e-9, 0.05, 0.2, 0.7, 1 - 1e-9)
    sides = [set(split_manifest(tmp_path, targets, fraction)[1]) for fraction in fractions]
    assert all(smaller < larger for smaller, larger in pairwise(sides))
    assert (len(sides[0]), len(sides[-1])) == (2, 198)


def test_fraction_is_that_of_the_images_of_each_class(tmp_path):
    _, val = split_manifest(tmp_path, {number: "aaaab"[number % 5] for number in range(5000)}, 0.2)
    assert abs(list(val.values()).count("a") - 800) < 80
    assert abs(list(val.values()).count("b") - 200) < 40


def test_side_of_an_image_is_the_same_everywhere(tmp_path):
    targets = {number: "ab"[number % 2] for number in range(20)}
    _, val = split_manifest(tmp_path, targets, 0.2)
    assert list(val) == [f"s3://b/{number}.jpg" for number in (2, 4, 5, 7, 15, 16)]


def test_both_sets_keep_the_order_of_the_listing(tmp_path):
    numbers = list(range(9000))
    random.Random(1).shuffle(numbers)
    train, val = split_manifest(tmp_path, {number: "ab"[number % 2] for number in numbers}, 0.5)
    order = [f"s3://b/{number}.jpg" for number in numbers]
    assert list(train) == [uri for uri in order if uri in train]
    assert list(val) == [uri for uri in order if uri in val]


def test_no_fraction_means_no_validation(tmp_path):
    write_files(tmp_path, *(f"{name}/{number}.jpg" for name in "ab" for number in range(20)))
    found, notices = split(tmp_path, val_fraction=0)
    assert (len(found.train), len(found.val), notices) == (40, 0, [])
    assert found.val.schema.equals(schema.EXAMPLES)


def test_only_image_of_a_class_is_trained_on_with_a_word(tmp_path):
    write_files(tmp_path, *(f"a/{number}.jpg" for number in range(20)), "b/1.jpg")
    found, (notice,) = split(tmp_path, val_fraction=0.999)
    assert labels(found)[f"{tmp_path}/b/1.jpg"] == "b"
    assert notice == "1 of 2 classes have no image to validate on: 'b'"


def test_classes_of_one_image_each_leave_nothing_to_validate_on(tmp_path):
    write_files(tmp_path, "a/1.jpg", "b/1.jpg")
    (fault,) = find_faults(tmp_path, val_fraction=0.5)
    assert "no image is left to validate on" in fault and "--val-fraction 0" in fault


# ---------------------------------------------------------------------------------------------------------------
# Folders without images


def test_class_folder_without_images_is_an_error_that_names_it(tmp_path):
    write_files(tmp_path, "ants/1.jpg", "bees/1.jpg", "wasps/notes.md", "50%#/x/readme", "notes.md")
    faults = find_faults(tmp_path)
    assert faults == (
        f"class '50%#' has no images to train on: {tmp_path}/50%# (if it is no class: --exclude '50%#/**')",
        f"class 'wasps' has no images to train on: {tmp_path}/wasps (if it is no class: --exclude 'wasps/**')",
    )
    found, _ = split(tmp_path, selection=Selection(exclude=("50%#/**", "wasps/**")))
    assert found.categories == ("ants", "bees")


def test_class_folder_of_a_bucket_without_images_is_an_error(bucket, put_object):
    for key in ("in/ants/1.jpg", "in/bees/1.jpg", "in/wasps/", "in/.git/x", "in//1.jpg"):
        put_object(key)
    (fault,) = find_faults(f"s3://{bucket}/in")
    assert fault.startswith(f"class 'wasps' has no images to train on: s3://{bucket}/in/wasps (")


def test_root_of_a_bucket_is_looked_through_as_well(bucket, put_object):
    for key in ("ants/1.jpg", "bees/1.jpg", "wasps/notes.md"):
        put_object(key)
    (fault,) = find_faults(f"s3://{bucket}")
    assert f"s3://{bucket}/wasps" in fault


def test_many_empty_folders_are_counted(tmp_path):
    write_files(tmp_path, "a/1.jpg", "b/1.jpg", *(f"x{number}/notes" for number in range(8)))
    faults = find_faults(tmp_path)
    assert len(faults) == 6
    assert faults[-1] == "and 3 more classes have no images to train on"


def test_folders_that_hold_images_in_their_own_way_are_not_empty(tmp_path):
    write_files(tmp_path, "ants/1.jpg", "bees/2020/1.jpg", "colon:/2021/1.jpg", ".hidden/notes", "__MACOSX/1.jpg")
    (tmp_path / "tars").mkdir()
    write_labelled_tar(tmp_path / "tars/x.tar", ["moth"])
    (tmp_path / "tables").mkdir()
    write_parquet(tmp_path / "tables/x.parquet", ["gnat"])
    (tmp_path / "linked").symlink_to("ants")
    assert split(tmp_path)[0].categories == ("2020", "2021", "ants", "gnat", "linked", "moth")


def test_class_with_images_elsewhere_may_have_an_empty_folder(tmp_path):
    write_files(tmp_path, "x/ants/1.jpg", "x/bees/1.jpg", "y/ants/notes", "y/bees/1.jpg")
    assert split((tmp_path / "x", tmp_path / "y"))[0].categories == ("ants", "bees")


def test_empty_folder_among_the_inputs_is_an_error(tmp_path):
    write_files(tmp_path, "ants/1.jpg", "bees/1.jpg", "wasps/notes")
    (fault,) = find_faults(tuple(tmp_path / name for name in ("ants", "bees", "wasps")))
    assert fault == f"class 'wasps' has no images to train on: {tmp_path}/wasps"


def test_empty_folder_that_a_pattern_names_is_an_error(tmp_path):
    write_files(tmp_path, "ants/1.jpg", "bees/1.jpg", "beetles/notes", "wasps/notes")
    (fault,) = find_faults((f"{tmp_path}/ants", f"{tmp_path}/b*"))
    assert f"{tmp_path}/beetles" in fault


def test_output_among_the_folders_is_no_class(tmp_path):
    write_files(tmp_path, "data/ants/1.jpg", "data/bees/1.jpg", "data/runs/one/run.json", "data/out/x")
    (tmp_path / "link").symlink_to("data")
    for output in ("data/runs/one", "link/runs/one"):
        (fault,) = find_faults(tmp_path / "data", output=f"{tmp_path}/{output}")
        assert f"{tmp_path}/data/out" in fault


def test_folders_give_no_classes_where_the_labels_come_from_elsewhere(tmp_path):
    write_files(tmp_path, "notes/readme.md")
    write_parquet(tmp_path / "x.parquet", ["ant", "bee"])
    assert split(tmp_path, target="none")[0].categories == ("ant", "bee")


def test_folder_that_cannot_be_listed_again_ends_the_command(faulty_s3, bucket, put_object, waits):
    for key in ("in/ants/1.jpg", "in/bees/1.jpg"):
        put_object(key)
    faulty_s3.answer(403, DENIED, path=r"list-type=2.*prefix=in%2F(&|$)", skip=1)
    with pytest.raises(StorageError, match=f"cannot list s3://{bucket}/in: AccessDenied"):
        split(f"s3://{bucket}/in")


# ---------------------------------------------------------------------------------------------------------------
# On disk

cells = st.sampled_from(["a", "b", "ab", "a, b"])
optional = st.none() | st.integers(0, 1)
rows = st.lists(
    st.fixed_dictionaries(
        {"uri": cells, "target": cells, "offset": optional, "size": optional, "unit": optional}
        | {"label_id": st.integers(0, 1), "error": st.none()}
    ),
    max_size=2,
)


def make_split(train: list[dict], val: list[dict], categories=("x", "y")) -> Split:
    tables = (pa.Table.from_pylist(some, schema=schema.EXAMPLES) for some in (train, val))
    unlisted = pa.Table.from_pylist([{"uri": "z", "error_stage": "list", "error": "e"}], schema=schema.UNUSABLE)
    return Split(categories=tuple(categories), train=next(tables), val=next(tables), unlisted=unlisted)


@given(first=st.tuples(rows, rows), second=st.tuples(rows, rows))
@settings(max_examples=300)
@example(first=([], []), second=([], []))
def test_hash_is_equal_for_equal_sets_only(tmp_path_factory, first, second):
    folder = open_folder(str(tmp_path_factory.mktemp("out")), scratch="tmp")
    hashes = [write_split(folder, make_split(*one)) for one in (first, second)]
    assert (hashes[0] == hashes[1]) == (first == second)


def test_hash_covers_the_categories_in_their_order(folder):
    row = {"uri": "a", "target": "a", "label_id": 0}
    orders = [("x", "y"), ("y", "x"), ("x", "y", "z"), ("x, y",), ("xy",)]
    assert len({write_split(folder, make_split([row], [], order)) for order in orders}) == len(orders)


def test_hash_does_not_depend_on_how_the_rows_are_held(folder):
    row = {"uri": "a", "target": "a", "label_id": 0}
    whole = make_split([row | {"uri": str(number)} for number in range(10_000)], [])
    pieces = pa.concat_tables([whole.train.slice(first, 777) for first in range(0, 10_000, 777)])
    cut = Split(categories=whole.categories, train=pieces, val=whole.val, unlisted=whole.unlisted)
    assert pieces["uri"].num_chunks > 1
    assert write_split(folder, cut) == write_split(folder, whole)


def test_written_sets_are_read_back_as_they_were(tmp_path, folder):
    write_files(tmp_path, *(f"in/{name}/{number}.jpg" for name in ("é%", "b") for number in range(50)))
    (tmp_path / "in/x.tar").write_bytes(b"no tar at all" * 100)
    found, _ = split(tmp_path / "in", val_fraction=0.3)
    assert min(len(found.train), len(found.val), len(found.unlisted)) > 0
    write_split(folder, found)
    for name, table in (("train", found.train), ("val", found.val)):
        assert read_examples(folder, name).equals(table)
        assert read_examples(folder, name).schema.equals(schema.EXAMPLES)
    assert read_unlisted(folder).equals(found.unlisted)
    assert folder.list_names(PLAN_DIR) == ["train.parquet", "unlisted.parquet", "val.parquet"]


def test_sets_are_kept_in_a_bucket(tmp_path, bucket):
    write_files(tmp_path, "in/a/1.jpg", "in/b/1.jpg")
    found, _ = split(tmp_path / "in")
    local, remote = (open_folder(place, scratch="tmp") for place in (f"{tmp_path}/out", f"s3://{bucket}/out"))
    assert write_split(remote, found) == write_split(local, found)
    assert read_examples(remote, "train").equals(found.train)
    assert len(read_examples(remote, "val")) == 0


def test_rows_are_the_images_that_were_listed(tmp_path, folder):
    (tmp_path / "in").mkdir()
    write_labelled_tar(tmp_path / "in/a.tar", ["x", "y"] * 5)
    write_labelled_tar(tmp_path / "in/b.tgz", ["x", "y"] * 5)
    write_parquet(tmp_path / "in/c.parquet", ["x", "y"] * 5, row_group_size=3)
    write_files(tmp_path / "in", "x/1.jpg", "y/2.jpg")
    options = ListingOptions(target="folder")
    listed = list(Inputs((f"{tmp_path}/in",), options=options).list_images())
    found, _ = split(tmp_path / "in")
    write_split(folder, found)
    table = pa.concat_tables([read_examples(folder, "train").slice(0, 7), read_examples(folder, "train").slice(7)])
    assert to_images(table, range(len(table))) == listed
    assert to_images(table, range(5, 20)) == listed[5:20]
    assert to_images(table, [31, 0, 9, 9]) == [listed[row] for row in (31, 0, 9, 9)]
    assert to_images(table, range(10, 0, -3)) == [listed[row] for row in range(10, 0, -3)]
    assert to_images(table, []) == to_images(table, range(4, 4)) == []
    assert all(isinstance(image, ListedImage) for image in to_images(table, [3]))


def test_images_of_both_sets_can_be_read(tmp_path):
    (tmp_path / "in").mkdir()
    write_labelled_tar(tmp_path / "in/a.tgz", ["x", "y"] * 20)
    write_parquet(tmp_path / "in/c.parquet", ["x", "y"] * 20, row_group_size=7)
    found, _ = split(tmp_path / "in", val_fraction=0.4)
    contents = [*fetch_all(to_images(found.train, range(len(found.train))))]
    contents += fetch_all(to_images(found.val, range(len(found.val))))
    assert len(found.val) > 10
    assert sorted(contents, key=int) == sorted([b"%d" % number for number in range(40)] * 2, key=int)


def test_splitting_takes_little_memory_beside_the_columns(tmp_path):
    count = 40_000
    uris = (f"s3://bucket/photos/{number % 100:04d}/IMG_{number:06d}.JPG" for number in range(count))
    (tmp_path / "m.csv").write_text("uri,label\n" + "".join(f"{uri},{uri[20:24]}\n" for uri in uris))
    inputs = Inputs((f"{tmp_path}/m.csv",), options=ListingOptions())
    write_files(tmp_path, "a/1.jpg", "b/1.jpg")
    split(tmp_path)  # once, for what is imported on the way
    tracemalloc.start()
    try:
        found = split_images(inputs, None, val_fraction=0.1, notice=print)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.train) + len(found.val) == count
    assert peak < 8e6  # a list of them all takes 11
    assert (found.train.nbytes + found.val.nbytes) / count < 100


# ---------------------------------------------------------------------------------------------------------------
# Real data


def test_real_photographs_in_folders_become_two_sets(shared_data):
    train, val, notices = sets(shared_data / "hymenoptera")
    found, more = split(train, val)
    assert notices == more == []
    assert found.categories == ("ants", "bees")
    assert (len(found.train), len(found.val), len(found.unlisted)) == (245, 153, 0)
    assert found.val["label_id"].to_pylist() == [0] * 70 + [1] * 83


def test_real_parquet_is_validated_on_a_tar_of_class_ids(shared_data):
    parquet = tuple(sorted((shared_data / "cifar10").glob("train-*.parquet")))
    found, (notice,) = split(parquet, shared_data / "cifar10" / "test-00000.tar")
    assert found.categories == tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
    assert "0 is 'airplane', 9 is 'truck'" in notice
    assert (len(found.train), len(found.val)) == (50_000, 10_000)
    ids = [pq.read_table(path, columns=["label"])["label"].to_pylist() for path in parquet]
    assert found.train["label_id"].to_pylist() == [label for part in ids for label in part]
    assert found.val["label_id"].to_pylist() == list(map(int, found.val["target"].to_pylist()))
