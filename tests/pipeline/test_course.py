"""The plan of a training is sealed once, and an output is cleared of its training and of nothing else."""

from __future__ import annotations

import json

import pytest
from training import COLOURS, tabulate, untimed, write_plan

from pipeline import schema
from pipeline.checkpoint import CHECKPOINT_DIR, Position, save
from pipeline.course import TrainingAccount, clear_training, describe_position, load_course, seal_course
from pipeline.curves import METRICS, open_curves
from pipeline.errors import OutputError
from pipeline.model_dir import MODEL_FILES
from pipeline.plan import SEAL, load_plan, seal_plan, write_listing
from pipeline.recipe import UNUSABLE
from pipeline.run import RUN, SUCCESS
from pipeline.sources import ListedImage
from pipeline.split import Split, write_split

SPLIT = Split(
    categories=COLOURS,
    train=tabulate(["/a.png", "/b.png", "/c.png"], [0, 1, 2]),
    val=tabulate(["/d.png"], [2]),
    unlisted=schema.UNUSABLE.empty_table(),
)
# What a run's account says of its model.
MODEL = {"model": "tiny", "weights": "none", "fixed": {}}
MODEL |= {"resize": 20, "crop": 16, "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}
ROW = {"epoch": 1, "train_loss": 0.5, "val_top1": 0.75, "images_per_s": 10.0}


def seal(folder, **resolved):
    return seal_course(folder, SPLIT, hash=write_split(folder, SPLIT), given={"lr": "auto"}, resolved=resolved)


def test_sealed_course_is_what_a_resumed_run_finds(folder):
    assert load_course(folder) is None
    course = seal(folder, mean=(0.1, 0.2), recipe={"lr": 1e-3})
    assert load_course(folder) == course
    assert (course.categories, course.num_train, course.num_val) == (COLOURS, 3, 1)
    assert course.resolved == {"mean": [0.1, 0.2], "recipe": {"lr": 1e-3}}
    assert seal(folder).run_id != course.run_id


def test_images_without_a_seal_are_no_course(folder):
    write_split(folder, SPLIT)
    assert load_course(folder) is None


def test_labelling_refuses_the_folder_of_a_training(folder):
    seal(folder)
    with pytest.raises(OutputError, match=r"holds a run of `nightshift finetune`, and not of `label`; name another"):
        load_plan(folder)


def test_training_refuses_the_folder_of_a_labelling(folder):
    seal_plan(folder, write_listing(folder, [ListedImage("/a.jpg")]), given={}, resolved={}, epoch=0)
    with pytest.raises(OutputError, match=r"holds a run of `nightshift label`, and not of `finetune`; name another"):
        load_course(folder)


def test_course_of_another_version_is_refused(folder):
    seal(folder)
    fields = json.loads(folder.read(SEAL))
    folder.put(SEAL, json.dumps(fields | {"format": 99}).encode())
    with pytest.raises(OutputError, match="plan of format 99, and this nightshift knows 1"):
        load_course(folder)


def list_files(folder) -> set[str]:
    return {str(path.relative_to(folder.root)) for path in folder.root.rglob("*") if path.is_file()}


def test_only_what_a_training_left_is_cleared(folder):
    others = {
        "notes.txt",
        "model/notes.txt",
        "tensorboard/deeper/events",
        "predictions/part-000000-abc.parquet",
        "_nightshift/lease",
        "_nightshift/logs/log.txt",
    }
    for name in others:
        folder.put(name, b"somebody's")
    write_plan(folder, SPLIT.train, SPLIT.val)
    course = seal(folder, **MODEL)
    save(folder, Position(run_id=course.run_id, best_epoch=1), {}, {})
    with open_curves(folder) as curves:
        curves.write([ROW])
    TrainingAccount(folder, course, started=0.0).write("done")
    for name in (UNUSABLE, SUCCESS, *(f"model/{name}" for name in MODEL_FILES)):
        folder.put(name, b"")
    assert {RUN, METRICS, SEAL, f"{CHECKPOINT_DIR}/latest.json"} < list_files(folder)
    clear_training(folder)
    assert list_files(folder) == others


def test_empty_folder_is_cleared_without_a_word(folder):
    clear_training(folder)


def test_account_of_a_training_tells_counts_speed_and_the_best_epoch(folder):
    account = TrainingAccount(folder, seal(folder, **MODEL), started=0.0)
    assert account.write()["best"] is None and account.write()["throughput"]["images_per_s"] is None
    account.history = [ROW, {**ROW, "epoch": 2, "images_per_s": 30.0}]
    account.best_epoch, account.num_unusable = 2, 1
    written = account.write("done")
    assert written == json.loads(folder.read(RUN))
    assert written["counts"] == {"train": 3, "val": 1, "unusable": 1}
    assert (written["job"], written["categories"], written["epochs"]) == ("finetune", 3, 2)
    assert untimed([written["best"]])[0]["epoch"] == 2
    assert written["throughput"]["images_per_s"] == 15.0, "six images in 0.3 + 0.1 seconds"


@pytest.mark.parametrize(
    ("epoch", "step", "expected"),
    [(0, 1, "epoch 1 up to step 1"), (2, 1234, "epoch 3 up to step 1,234"), (2, 0, "epoch 2")],
)
def test_people_count_from_one(folder, epoch, step, expected):
    position = Position(run_id="run", epoch=epoch, step=step)
    assert describe_position(position) == expected


def test_stopped_training_says_what_is_kept(folder):
    course = seal(folder)
    account = TrainingAccount(folder, course, started=0.0)
    assert account.describe_stop() == "stopped before the first checkpoint; the same command starts again"
    save(folder, Position(run_id=course.run_id, epoch=1, step=5), {}, None)
    assert account.describe_stop() == (
        "stopped: epoch 2 up to step 5 and all before it is kept; the same command continues"
    )
