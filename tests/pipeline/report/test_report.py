"""Pages of runs: what is on them, what is not, and that names are only names.

pytest tests/pipeline/report/test_report.py
"""

from __future__ import annotations

import html
import json
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from runs import draw_scores, make_rows, write_pictures, write_run

from pipeline import parts
from pipeline.errors import OutputError
from pipeline.evaluation import evaluate_run, open_finished
from pipeline.report import MAX_BYTES, compose_report, read_account
from pipeline.report.charts import draw_lines, find_ticks
from pipeline.report.pace import MIN_PARTS, find_pace
from pipeline.report.samples import MAX_COUNTED_PARTS, MAX_SHOWN_PARTS, NUM_SHOWN, draw_samples, tally
from pipeline.report.thumbnails import SIDE_PX, make_thumbnails
from pipeline.run import METRICS, RUN

EVIL_FILES = ("<script>alert('file')<script>.jpg", "\"><img src=x onerror=alert(1)>'.jpg")
EVIL_CLASSES = ("<script>alert('class')</script>", "\"'><b>&amp;", "</style><script>x</script>", "{{ 7 * 7 }}")
EVIL_ERROR = "OSError: <script>alert('error')</script>"


class Page(HTMLParser):
    """The elements of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture
def make(tmp_path):
    """A function that writes a run over real pictures with names and classes of all kinds, evaluated."""

    def make(num_images=40, *, names=(), shard_size=16, missing=(), errors=None, categories=EVIL_CLASSES):
        names = [*names, *(f"{number:05d}.jpg" for number in range(num_images - len(names)))]
        paths = write_pictures(tmp_path / "images", names)
        for index in missing:
            os.unlink(paths[index])
        scores = draw_scores(num_images, len(categories))
        targets = [categories[number % len(categories)] for number in range(num_images)]
        labels = tmp_path / "labels.txt"
        labels.write_text("\n".join(categories))
        rows = make_rows(
            [path.replace("%", "%25") for path in paths], scores, categories=categories, targets=targets, errors=errors
        )
        options = {"inputs": [str(tmp_path / "images")], "labels": str(labels), "shard_size": shard_size}
        folder = write_run(str(tmp_path / "run"), rows, categories=categories, **options)
        folder.put(METRICS, json.dumps(evaluate_run(folder, open_finished(folder))).encode())
        return folder

    return make


def compose(folder) -> str:
    return compose_report(folder, read_account(folder), retries=0)


# ---------------------------------------------------------------------------------------------------------------
# The page


def test_names_of_files_classes_and_errors_are_only_names(make):
    text = compose(make(names=EVIL_FILES, errors={5: EVIL_ERROR}))
    page = Page(text)
    assert page.count("script") == 1  # its own
    assert not [name for name, attributes in page.elements for key in attributes if key.startswith("on")]
    assert all(
        attributes["src"].startswith("data:image/jpeg;base64,")
        for _, attributes in page.elements
        if "src" in attributes
    )
    assert page.count("b") == text.count("<b>")  # those of the template
    shown = "".join(page.texts)
    for name in (*EVIL_CLASSES, EVIL_ERROR):
        assert name in shown
    titles = [attributes.get("title") or "" for _, attributes in page.elements]
    for name in EVIL_FILES:
        assert any(title.endswith(name) for title in titles)


def test_nothing_is_loaded_and_nothing_but_the_own_script_may_run(make):
    text = compose(make())
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.search(r"url\(|@import|https?://", text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src &#39;none&#39;" in policy or "default-src 'none'" in policy
    assert "script-src 'sha256-" in html.unescape(policy) and "unsafe-inline'; script" in html.unescape(policy)
    assert len(text.encode()) < MAX_BYTES


def test_figures_on_the_page_are_those_of_the_run(make):
    folder = make(errors={3: "OSError: broken"})
    metrics = json.loads(folder.read(METRICS))
    shown = " ".join(Page(compose(folder)).texts).replace("\u00a0", " ")
    for share in (metrics["top1"]["value"], metrics["top1"]["low"], metrics["top1"]["high"]):
        assert f"{100 * share:.1f} %" in shown
    assert f"{100 * metrics['calibration']['ece']:.2f} %" in shown
    assert "1 min 15 s" in shown and "12.5" in shown


def test_a_missing_image_has_a_placeholder_that_says_why(make):
    folder = make(missing=range(40))
    page = Page(compose(folder))
    assert page.count("img") == 0
    placeholders = [attributes for _, attributes in page.elements if attributes.get("class") == "missing"]
    assert len(placeholders) > 10
    assert "FileNotFoundError" in " ".join(page.texts)


def test_figures_of_labels_that_have_changed_since_are_left_out(make):
    folder = make()
    account = json.loads(folder.read(RUN))
    account["invocations"].append(account["invocations"][0])
    folder.put(RUN, json.dumps(account).encode())
    shown = " ".join(Page(compose(folder)).texts)
    assert "have changed since they were evaluated" in shown
    assert "How good the labels are" not in shown


def test_a_run_that_is_not_complete_says_so(make):
    folder = make()
    folder.put(RUN, json.dumps(json.loads(folder.read(RUN)) | {"state": "stopped"}).encode())
    assert "This run is not complete (stopped)" in " ".join(Page(compose(folder)).texts)


def test_what_is_no_run_is_refused(tmp_path, make):
    folder = make()
    folder.put(RUN, json.dumps(json.loads(folder.read(RUN)) | {"job": "other"}).encode())
    with pytest.raises(OutputError, match="a run of `nightshift other`"):
        read_account(folder)
    folder.put(RUN, b"{")
    with pytest.raises(OutputError, match="is damaged"):
        read_account(folder)
    folder.delete(RUN)
    with pytest.raises(OutputError, match="holds no run"):
        read_account(folder)


def test_the_page_of_a_thousand_classes_stays_small(tmp_path):
    categories = [f"a class with a long enough name, number {number}" for number in range(1_000)]
    scores = draw_scores(3_000, 1_000)
    targets = [categories[number % 1_000] for number in range(3_000)]
    (tmp_path / "labels.txt").write_text("\n".join(categories))
    rows = make_rows([f"/nowhere/{i}.jpg" for i in range(3_000)], scores, categories=categories, targets=targets)
    folder = write_run(str(tmp_path / "run"), rows, categories=categories, labels=str(tmp_path / "labels.txt"))
    folder.put(METRICS, json.dumps(evaluate_run(folder, open_finished(folder))).encode())
    text = compose(folder)
    assert len(text.encode()) < 1_500_000
    assert 'class="matrix"' not in text


# ---------------------------------------------------------------------------------------------------------------
# Samples and thumbnails


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of many parts whose images are nowhere."""
    uris = [f"/nowhere/{number}.jpg" for number in range(2_400)]
    rows = make_rows(uris, draw_scores(2_400, 4), categories="abcd", errors={i: "OSError: x" for i in range(9)})
    return write_run(str(tmp_path_factory.mktemp("large") / "run"), rows, categories="abcd", shard_size=4)


def test_few_row_groups_are_read_whatever_the_size_of_the_run(large, monkeypatch):
    read = []
    original = large.open_read
    monkeypatch.setattr(type(large), "open_read", lambda self, name: read.append(name) or original(name))
    listed = parts.list_parts(large)
    assert len(listed) == 600
    samples = draw_samples(large, listed, seed="x")
    assert len(read) == len(set(read)) == MAX_SHOWN_PARTS
    assert len(samples.at_random) == len(samples.least_certain) == NUM_SHOWN
    assert len(samples.most_certain) == 4
    read.clear()
    counted = tally(large, listed)
    assert len(read) == MAX_COUNTED_PARTS and counted.num_images == 4 * MAX_COUNTED_PARTS
    assert "Counted on a sample of 2,048 images" in compose(large)


def test_samples_are_the_same_each_time_and_what_they_are_called(large):
    listed = parts.list_parts(large)
    one, other = (draw_samples(large, listed, seed="x") for _ in range(2))
    assert one == other
    assert draw_samples(large, listed, seed="y").at_random != one.at_random
    scores = [row["score"] for row in one.least_certain]
    assert scores == sorted(scores)
    assert len({row["label"] for row in one.most_certain}) == 4
    looked_at = [
        row
        for table in parts.sample_tables(large, listed, ["label", "score"], max_parts=MAX_SHOWN_PARTS)
        for row in table.to_pylist()
    ]
    for row in one.most_certain:
        assert row["score"] == max(other["score"] for other in looked_at if other["label"] == row["label"])
    assert scores[0] == min(row["score"] for row in looked_at if row["score"] is not None)


def test_counts_are_those_of_all_rows_where_all_are_read(make):
    folder = make(60, errors={2: "OSError: a", 3: "OSError: b", 50: "EmptyFile: c"})
    found = tally(folder, parts.list_parts(folder))
    assert found.num_images == 60 and found.labels.total() == 57 == int(found.score_bins.sum())
    assert found.errors == {"OSError": 2, "EmptyFile": 1}
    assert [row["error"] for row in found.examples["OSError"]] == ["OSError: a", "OSError: b"]


def test_thumbnails_are_small_and_stop_at_their_limits(tmp_path, monkeypatch):
    paths = write_pictures(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])

    def make():
        uris = [*paths, paths[0], "/no.jpg"]
        return make_thumbnails(
            uris, exif="ignore", max_pixels=10**6, image_column=None, retries=0, tell=lambda number: None
        )

    found = make()
    assert set(found.pictures) == set(paths) and found.find("/no.jpg") is None
    assert found.find_reason("/no.jpg").startswith("FileNotFoundError")
    assert max(map(len, found.pictures.values())) < 20_000 and SIDE_PX < 400
    monkeypatch.setattr("pipeline.report.thumbnails.MAX_TOTAL_BYTES", 1)
    assert "too large" in make().find_reason(paths[0])
    monkeypatch.setattr("pipeline.report.thumbnails.MAX_SECONDS", -1.0)
    assert make().find_reason(paths[0]) == "not read in time"


# ---------------------------------------------------------------------------------------------------------------
# Charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.61, 0.93, [0.6, 0.7, 0.8, 0.9, 1.0]), (5, 5, None), (0, 3_700, None)],
)
def test_ticks_are_round_and_hold_all_values(low, high, ticks):
    found = find_ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    assert ticks is None or found == pytest.approx(ticks)


def test_lines_stay_inside_their_chart_and_gaps_are_left_out():
    chart = draw_lines(
        "Loss", [1, 2, 3], [("a", [3.0, None, 1.0]), ("b", [float("nan"), 2.0, float("inf")]), ("c", [None] * 3)],
        x_name="epoch", marker=2,
    )  # fmt: skip
    assert [line.name for line in chart.lines] == ["a", "b"]
    assert chart.marker == 50
    for line in chart.lines:
        for x, y in (map(float, point.split(",")) for point in line.points.split()):
            assert 0 <= x <= 100 and 0 <= y <= 100
    assert len(chart.lines[1].dots) == 1  # of a line with a single point, nothing would be seen
    assert draw_lines("Loss", [1], [("a", [None])], x_name="epoch") is None


def test_speed_over_time_follows_from_the_times_of_the_parts(large, monkeypatch):
    listed = parts.list_parts(large)
    assert find_pace(large, listed[: MIN_PARTS - 1]).chart is None
    now = time.time()
    for number, part in enumerate(listed):
        # 4 images every 10 s, and twice as fast in the second half.
        at = now + (10 * number if number < 300 else 3_000 + 5 * (number - 300))
        os.utime(large.path(f"predictions/{part.name}"), (at, at))
    chart = find_pace(large, listed).chart
    texts = [column.text for column in chart.columns]
    speeds = [float(re.search(r"images/s: ([\d.]+)", text)[1]) for text in texts]
    assert np.mean(speeds[:30]) == pytest.approx(0.4, rel=0.1)
    assert np.mean(speeds[-15:]) == pytest.approx(0.8, rel=0.1)
    for part in listed:
        os.utime(large.path(f"predictions/{part.name}"), (now, now))
    assert "equally old" in find_pace(large, listed).reason
