"""Tables of true labels: how they are read, which image a row is about, and which class its value means.

pytest tests/pipeline/test_targets.py
"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.targets import Matcher, match_classes, read_targets

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def write(tmp_path):
    """A function that writes a table and reads it as targets."""

    def write(text: str, name: str = "truth.csv", column: str | None = None):
        (tmp_path / name).write_text(text)
        return read_targets(str(tmp_path / name), column)

    return write


# ---------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("file_name,label\na.jpg,ant\nb.jpg,bee\nc.jpg,\n", "truth.csv"),
        ("label\tpath\nant\ta.jpg\nbee\tb.jpg\n", "truth.tsv"),
        ('{"image": "a.jpg", "label": "ant"}\n\n{"image": "b.jpg", "label": "bee", "x": 1}\n', "truth.jsonl"),
        ("\ufefffile_name,whatever\na.jpg,ant\nb.jpg,bee\n", "of two columns, one is the other.csv"),
    ],
)
def test_every_kind_of_text_is_read(write, text, name):
    table = write(text, name)
    assert (table.references, table.values, table.has_integers) == (["a.jpg", "b.jpg"], ["ant", "bee"], False)


def test_parquet_and_json_know_integers_and_csv_does_not(write, tmp_path):
    pq.write_table(pa.table({"uri": ["a.jpg"], "label": pa.array([2], pa.int8())}), tmp_path / "t.parquet")
    assert read_targets(str(tmp_path / "t.parquet")).has_integers
    assert write('{"uri": "a.jpg", "label": 2}\n', "t.jsonl").has_integers
    assert not write("uri,label\na.jpg,2\n").has_integers


@pytest.mark.parametrize(
    ("text", "column", "fault"),
    [
        ("file_name,label\na.jpg,ant\n", "species", "has no such column; it has file_name, label"),
        ("file_name,genus,species\na.jpg,x,y\n", None, "name one with --target-column"),
        ("picture,x,label\na.jpg,1,ant\n", None, "names images; it has picture, x, label"),
        ("file_name,label\n,ant\na.jpg,\n", None, "no row has both a 'file_name' and a 'label'"),
        ('file_name,label\n"a.jpg,ant\n', None, "no .csv that can be read"),
    ],
)
def test_what_is_no_table_of_labels_is_refused(write, text, column, fault):
    with pytest.raises(ConfigError) as error:
        write(text, column=column)
    assert fault in str(error.value)


def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_targets(str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match=r"is none of \.csv"):
        read_targets(str(tmp_path / "truth.xlsx"))


# ---------------------------------------------------------------------------------------------------------------
# Matching


def find(matcher: Matcher, uri: str) -> tuple[int | None, str | None]:
    before = dict(matcher.rules)
    row = matcher.find(uri)
    rules = [rule for rule, count in matcher.rules.items() if count != before.get(rule, 0)]
    return row, rules[0] if rules else None


@pytest.mark.parametrize(
    ("reference", "uri", "rule"),
    [
        ("/photos/x/a.jpg", "/photos/x/a.jpg", "full URI"),
        ("s3://bucket/x/a.jpg", "s3://bucket/x/a.jpg", "full URI"),
        ("tar://x/a.jpg::/photos/t.tar", "tar://x/a.jpg::/photos/t.tar", "full URI"),
        ("x/a.jpg", "/photos/x/a.jpg", "path below an INPUT"),
        ("./x/a.jpg", "/photos/x/a.jpg", "path below an INPUT"),
        ("x/100% #1.jpg", "/photos/x/100%25 %231.jpg", "path below an INPUT"),
        ("x/a.jpg", "tar://x/a.jpg::/photos/t.tar", "path below an INPUT"),
        ("t.tar/x/a.jpg", "tar://x/a.jpg::/photos/t.tar", "path below an INPUT"),
        ("t.parquet#row=3", "/photos/t.parquet#row=3", "full URI"),
        ("a.jpg", "/photos/x/a.jpg", "base name"),
        ("/home/somebody/else/a.jpg", "/photos/x/a.jpg", "base name"),
        ("a.jpg", "zip://deep/below/a.jpg::/photos/t.zip", "base name"),
        ("b.jpg", "/photos/x/a.jpg", None),
        ("ba.jpg", "/photos/x/a.jpg", None),
    ],
)
def test_a_row_is_about_the_image_that_it_names(tmp_path, reference, uri, rule):
    # The table itself is in the folder of the images, where a relative name with `#row=` is a full one.
    place = "/photos" if "#row=" in reference else str(tmp_path)
    (tmp_path / "truth.jsonl").write_text(json.dumps({"uri": reference.replace("%", "%25"), "label": "ant"}))
    table = read_targets(str(tmp_path / "truth.jsonl"))
    object.__setattr__(table, "references", [reference])
    object.__setattr__(table, "name_column", "file_name")
    object.__setattr__(table, "uri", f"{place}/truth.jsonl")
    assert find(Matcher(table, ["/photos"]), uri) == (None if rule is None else 0, rule)


def test_paths_are_relative_to_the_folder_of_an_input_that_is_a_file(write):
    table = write("file_name,label\na.jpg,ant\nb/a.jpg,bee\n")
    matcher = Matcher(table, ["/photos/a.jpg", "/archive/**/*.jpg", "/list.csv"])
    assert find(matcher, "/photos/a.jpg") == (0, "path below an INPUT")
    assert find(matcher, "/archive/b/a.jpg") == (1, "path below an INPUT")


def test_the_most_exact_rule_goes_first(write):
    matcher = Matcher(write("file_name,label\na.jpg,ant\nx/a.jpg,bee\n/photos/y/a.jpg,cat\n"), ["/photos"])
    assert find(matcher, "/photos/y/a.jpg") == (2, "full URI")
    assert find(matcher, "/photos/x/a.jpg") == (1, "path below an INPUT")
    assert find(matcher, "/photos/a.jpg") == (0, "path below an INPUT")
    with pytest.raises(ConfigError, match=r"'/photos/z/a\.jpg' could be 'a\.jpg' or 'x/a\.jpg'"):
        matcher.find("/photos/z/a.jpg")


def test_a_base_name_that_two_images_have_is_refused_with_both(write):
    matcher = Matcher(write("file_name,label\na.jpg,ant\n"), ["/photos"])
    assert matcher.find("/photos/x/a.jpg") == 0
    with pytest.raises(ConfigError) as error:
        matcher.find("/photos/y/a.jpg")
    assert "'a.jpg' could be '/photos/x/a.jpg' or '/photos/y/a.jpg'" in str(error.value)


def test_rows_that_contradict_each_other_are_refused(write):
    with pytest.raises(ConfigError, match="is both 'ant' and 'bee', in rows 1 and 3"):
        Matcher(write("file_name,label\na.jpg,ant\na.jpg,ant\na.jpg,bee\n"), ["/photos"])


def test_rows_without_an_image_are_counted(write):
    matcher = Matcher(write("file_name,label\na.jpg,ant\nb.jpg,bee\nc.jpg,cat\n"), ["/photos"])
    matcher.find("/photos/b.jpg")
    assert matcher.find_unused() == (2, "a.jpg")


# ---------------------------------------------------------------------------------------------------------------
# Classes


def match(counts, names=NAMES, *, has_integers=False):
    return match_classes(counts, names, has_integers=has_integers, where="here")


def test_names_go_before_numbers_and_integers_are_never_names():
    assert match({"bee": 3, "ant": 1}) == ("names", {"bee": 1, "ant": 0}, ())
    assert match({"2": 3, "0": 1}) == ("ids", {"2": 2, "0": 0}, ())
    digits = ("0", "1", "10", "2")  # in the order of folders
    assert match({"2": 1, "10": 1}, digits) == ("names", {"2": 3, "10": 2}, ())
    assert match({"2": 1, "1": 1}, digits, has_integers=True) == ("ids", {"2": 2, "1": 1}, ())


def test_a_few_unknown_names_are_classes_of_their_own():
    assert match({"bee": 8, "wasp": 2, "elk": 1}) == ("names", {"bee": 1, "wasp": 3, "elk": 4}, ("wasp", "elk"))


def test_lists_that_do_not_match_are_both_shown():
    with pytest.raises(ConfigError) as error:
        match({"ants": 10, "bees": 10})
    text = str(error.value)
    assert "none of the classes of the model" in text
    assert "targets  ants, bees" in text and "classes  ant, bee, cat" in text
    assert "'ants' perhaps 'ant', 'bees' perhaps 'bee'" in text
    with pytest.raises(ConfigError, match="only 1 of the 2 classes"):  # by accident, perhaps
        match({"cat": 10, "bees": 10})


def test_ids_that_no_class_has_are_refused():
    with pytest.raises(ConfigError, match=r"3 is none of a model with 3 classes \(0 to 2\)"):
        match({"0": 1, "3": 1})
    with pytest.raises(ConfigError, match="-1 is none"):
        match({"-1": 1}, has_integers=True)


def test_a_name_that_two_classes_have_is_refused():
    with pytest.raises(ConfigError, match="'crane' is the name of classes 0 and 2; give ids"):
        match({"crane": 1}, ("crane", "dog", "crane"))
    assert match({"dog": 1}, ("crane", "dog", "crane")).ids == {"dog": 1}
