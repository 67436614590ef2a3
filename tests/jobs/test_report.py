"""`nightshift report`: the command, and its page in a real browser.

pytest tests/jobs/test_report.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import open_browser
from runs import draw_scores, make_rows, write_pictures, write_run
from training import write_finetuned

from jobs.cli import run_command
from jobs.report import main
from pipeline.evaluation import evaluate_run, open_finished
from pipeline.run import METRICS

CATEGORIES = [
    "ant",
    "bee",
    "<script>alert('class')</script>",
    "a class whose name is longer than any phone is wide, with-a-word-that-nobody-could-ever-break-in-a-sensible-way",
    *(f"kind {number}" for number in range(16)),
]
FILES = ["<script>alert('file')<script>.jpg", "\"><img src=x onerror=alert(1)>'.jpg", f"{'long' * 50}.jpg"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """An evaluated run with everything that a page may have to show, failures and missing images among it."""
    root = tmp_path_factory.mktemp("evaluated")
    names = [*FILES, *(f"{number:05d}.jpg" for number in range(160 - len(FILES)))]
    paths = write_pictures(root / "images", names)
    for path in paths[40:60]:
        Path(path).unlink()
    targets = [CATEGORIES[number * number % len(CATEGORIES)] for number in range(160)]
    errors = {7: f"OSError: {'x' * 200} <b>", 8: "EmptyFile: the file has no bytes"}
    rows = make_rows(paths, draw_scores(160, 20), categories=CATEGORIES, targets=targets, errors=errors)
    (root / "labels.txt").write_text("\n".join(CATEGORIES))
    options = {"labels": str(root / "labels.txt"), "inputs": [str(root / "images")], "shard_size": 10}
    folder = write_run(str(root / "run"), rows, categories=CATEGORIES, **options)
    folder.put(METRICS, json.dumps(evaluate_run(folder, open_finished(folder))).encode())
    return root / "run"


@pytest.fixture
def report(capsys):
    """A function that runs the command and returns its exit code, stdout and stderr."""

    def report(*arguments):
        code = run_command(main, [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return report


def test_the_page_is_put_beside_the_run_or_where_it_is_wanted(report, evaluated, tmp_path):
    code, out, err = report(evaluated)
    assert (code, err) == (0, "")
    assert out.startswith(f"report   {evaluated}/report.html (")
    page = (evaluated / "report.html").read_bytes()
    assert page.startswith(b"<!doctype html>")
    assert report(evaluated, "-o", tmp_path / "page.html")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    code, _, err = report(evaluated, "-o", tmp_path)
    assert code == 2 and "is a folder; name a file" in err


def test_a_run_in_a_bucket_has_its_page_there(report, bucket, tmp_path):
    rows = make_rows(["/nowhere/a.jpg"], draw_scores(1, 2), categories="ab")
    folder = write_run(f"s3://{bucket}/run", rows, categories="ab")
    code, out, _ = report(f"s3://{bucket}/run")
    assert code == 0 and f"s3://{bucket}/run/report.html" in out
    assert folder.read("report.html").startswith(b"<!doctype html>")


def test_what_is_no_run_is_refused(report, tmp_path):
    code, _, err = report(tmp_path)
    assert code == 2 and "holds no run: there is no run.json in it" in err
    assert report()[0] == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------
# In a browser

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# What sticks out to the right of the page and lies in nothing that scrolls by itself.
STICKING_OUT = """[...document.querySelectorAll("main *")].filter((one) => !one.closest(".scroll, svg")
  && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((one) => one.outerHTML.slice(0, 120))"""
COLUMN = """[...document.querySelectorAll("#class-table tbody tr")].filter((row) => !row.hidden)
  .map((row) => row.cells[{index}].dataset.value)"""
ORDERS = "[...document.querySelectorAll('#class-table th[aria-sort]')].map((cell) => cell.getAttribute('aria-sort'))"


@pytest.mark.slow
def test_pages_hold_in_a_real_browser(report, evaluated, tmp_path):
    write_finetuned(tmp_path / "finetuned", tmp_path / "images", augment="light")
    assert report(evaluated)[0] == report(tmp_path / "finetuned")[0] == 0
    (tmp_path / "profile").mkdir()
    with open_browser(tmp_path / "profile") as browser:
        for run in (evaluated, tmp_path / "finetuned"):
            page = run / "report.html"
            for width in (1280, 390):
                for dark in (False, True):
                    browser.open(page, width=width, dark=dark)
                    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
                    assert browser.find_complaints() == []
                    assert browser.find_requests() == [page.as_uri()]
                    assert browser.evaluate(OVERFLOW) <= 0
                    assert browser.evaluate(STICKING_OUT) == []
                    assert browser.evaluate("[...document.images].every((one) => one.naturalWidth > 0)")
                    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                    assert (sum(map(int, colour[4:-1].split(","))) < 200) == dark

        browser.open(evaluated / "report.html", width=1280)
        assert browser.evaluate("document.scripts.length") == 1
        assert browser.evaluate("document.querySelectorAll('img[onerror], main script').length") == 0

        # A click sorts, and says so to those who do not see it; once more turns the order round.
        click = "document.querySelectorAll('#class-table th button')[{}].click()"
        for index, as_number in ((0, False), (3, True), (6, True)):
            browser.evaluate(click.format(index))
            first = browser.evaluate(COLUMN.format(index=index))
            orders = browser.evaluate(ORDERS)
            assert orders.pop(index) == ("descending" if as_number else "ascending") and set(orders) == {"none"}
            browser.evaluate(click.format(index))
            second = browser.evaluate(COLUMN.format(index=index))
            if as_number:
                assert [*map(float, first)] == sorted(map(float, first), reverse=True)
                assert [*map(float, second)] == sorted(map(float, first))
            else:
                assert set(first) == set(CATEGORIES) and second == first[::-1]
                assert first.index("kind 2") < first.index("kind 10")  # as people count

        # Whole numbers of one and of two digits, which texts would sort otherwise.
        numbers = browser.evaluate(COLUMN.format(index=3))
        assert sorted(numbers) != sorted(numbers, key=int)

        # The same with nothing but a keyboard.
        browser.evaluate("document.querySelector('#class-table th button').focus()")
        browser.press("Tab")
        browser.press("Enter")
        assert browser.evaluate(ORDERS)[1] == "descending"
        images = [*map(int, browser.evaluate(COLUMN.format(index=1)))]
        assert images == sorted(images, reverse=True)

        browser.evaluate(
            """(() => { const input = document.querySelector("input[data-filters]"); input.value = "KIND 1";
            input.dispatchEvent(new Event("input")); })()"""
        )
        assert set(browser.evaluate(COLUMN.format(index=0))) == {
            "kind 1",
            *(f"kind {number}" for number in range(10, 16)),
        }
        assert browser.find_complaints() == []
