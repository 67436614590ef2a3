"""`nightshift evaluate`: what it prints, how it ends, and that it labels first where that is to be done.

pytest tests/jobs/test_evaluate.py
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from runs import CLASSES, make_rows, write_run

from jobs.cli import run_command
from jobs.evaluate import EvaluateConfig, main, run
from pipeline.errors import ConfigError

SCORES = [[0.8, 0.15, 0.05], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6], [0.1, 0.85, 0.05], [0.4, 0.3, 0.3]]
TARGETS = ["ant", "bee", "cat", "ant", "cat"]


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A finished run: three images are right, one is wrong, and one has failed."""
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASSES))
    uris = [f"/photos/{number}.jpg" for number in range(5)]
    rows = make_rows(uris, SCORES, categories=CLASSES, targets=TARGETS, errors={4: "OSError: broken"}, top_k=3)
    write_run(str(tmp_path / "run"), rows, categories=CLASSES, labels=str(labels), top_k=3)
    return tmp_path / "run"


@pytest.fixture
def evaluate(capsys):
    """A function that runs the command and returns its exit code, stdout and stderr."""

    def evaluate(*arguments):
        code = run_command(main, [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return evaluate


def test_a_finished_run_is_told_in_a_few_lines(evaluate, labelled):
    code, out, err = evaluate(labelled)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "5 images with a known class: 3 right, 1 wrong, 1 failed"
    assert lines[1] == "top-1      60.00%  (95 % interval 23.07% to 88.24%)"
    assert lines[2].startswith("top-5      80.00%")  # of three classes, a failed image has none
    assert lines[3] == "coverage   80.00%; of the images that could be labelled, 75.00% are right"
    assert "targets    that came with the images: names of classes" in lines
    assert lines[-1] == f'look       nightshift report "{labelled}"'
    written = json.loads((labelled / "metrics.json").read_text())
    assert written["counts"] == {"images": 5, "right": 3, "wrong": 1, "failed": 1}


def test_json_is_the_document_that_is_written(evaluate, labelled):
    code, out, _ = evaluate(labelled, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((labelled / "metrics.json").read_text())


def test_fail_under_ends_with_one_and_says_why_in_one_line(evaluate, labelled):
    assert evaluate(labelled, "--fail-under", "0.6")[0] == 0
    code, out, err = evaluate(labelled, "--fail-under", "0.61")
    assert (code, err) == (1, "")
    assert out.splitlines()[-1] == "not good enough: top-1 is 0.6000, and --fail-under asks for 0.61"
    code, out, err = evaluate(labelled, "--fail-under", "0.61", "--json")
    assert code == 1 and json.loads(out)
    assert err == "not good enough: top-1 is 0.6000, and --fail-under asks for 0.61\n"


def test_a_table_goes_before_the_targets_of_the_run_and_what_was_used_is_told(evaluate, labelled, tmp_path):
    (tmp_path / "truth.csv").write_text("file_name,class,note\n0.jpg,bee,x\nelsewhere.jpg,ant,x\n")
    code, out, _ = evaluate(labelled, "--targets", tmp_path / "truth.csv", "--target-column", "class")
    assert code == 0
    assert out.startswith("1 images with a known class: 0 right, 1 wrong, 0 failed")
    assert f"column class of {tmp_path}/truth.csv: names of classes; images found 1 by base name" in out
    assert "1 of its 2 rows belong to no image, elsewhere.jpg for one" in out
    assert "4 images have no target, and are left out" in out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--target-column", "x"], "--target-column x: is a column of the file that --targets names"),
        (["--fail-under", "90"], "--fail-under 90.0: must be between 0 and 1"),
        (["--model", "resnet18"], "--model: is about labelling, which needs an output"),
        (["--targets", "nowhere.csv"], "--targets nowhere.csv: FileNotFoundError"),
        (["other"], "-o: name a folder for the labels, or give one finished run"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_read(evaluate, labelled, arguments, fault):
    code, out, err = evaluate(labelled, *arguments)
    assert (code, out) == (2, "")
    assert fault in err
    assert not (labelled / "metrics.json").exists()


def test_images_in_place_of_a_run_are_refused_with_what_works(evaluate, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    code, _, err = evaluate(tmp_path)
    assert code == 2 and "is no finished run; to label the images in it first, name an output with -o" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg"]
    assert evaluate(tmp_path / "nowhere")[0] == 2
    assert not (tmp_path / "nowhere").exists()


def test_all_faults_are_told_at_once(labelled):
    with pytest.raises(ConfigError) as error:
        EvaluateConfig(inputs=(str(labelled),), target_column="x", fail_under=2, top_k=3).check()
    assert len(error.value.faults) == 3


def test_images_are_labelled_first_and_then_compared(tmp_path, tiny_model_dir, make_images, ray_cluster, capsys):
    for number, name in enumerate(("ant", "bee")):
        make_images(tmp_path / "images" / name, 20, seed=number)
    (tmp_path / "images" / "ant" / "broken.jpg").write_bytes(b"no picture")
    config = EvaluateConfig(
        inputs=(str(tmp_path / "images"),),
        output=str(tmp_path / "run"),
        model=tiny_model_dir,
        precision="fp32",
        num_workers="1",
        quiet=True,
    )
    first = run(config)
    assert first.exit_code == 0
    assert first.metrics["counts"]["images"] == 41 and first.metrics["counts"]["failed"] == 1
    assert {row["label"] for row in first.metrics["classes"] if row["images"]} == {"ant", "bee"}
    # The same run, evaluated once more without its images, from the command line, and from another file.
    again = run(EvaluateConfig(inputs=(str(tmp_path / "run"),), quiet=True))
    assert again.metrics == first.metrics
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        paths = sorted((tmp_path / "images").rglob("*.jpg"))
        writer.writerows([str(path.relative_to(tmp_path / "images")), path.parent.name] for path in paths)
    other = run(EvaluateConfig(inputs=(str(tmp_path / "run"),), targets=str(tmp_path / "truth.csv"), quiet=True))
    assert other.metrics["top1"] == first.metrics["top1"] and other.metrics["classes"] == first.metrics["classes"]


@pytest.mark.slow
def test_photographs_and_their_table_give_the_accuracy_of_the_model(tmp_path, shared_data, ray_cluster):
    result = run(
        EvaluateConfig(
            inputs=(str(shared_data / "photos"),),
            output=str(tmp_path / "run"),
            model="squeezenet1_0",
            weights=str(shared_data / "weights" / "squeezenet1_0.pth"),
            precision="fp32",
            preprocess="exact",
            targets=str(shared_data / "photos.csv"),
            target_column="class_index",
            quiet=True,
        )
    )
    assert result.metrics["targets"]["kind"] == "ids"
    assert result.metrics["counts"] == {"images": 200, "right": 128, "wrong": 72, "failed": 0}
    assert result.metrics["top5"]["value"] == 0.85
