"""The plan of a training: which images, which classes and which settings, sealed before any worker starts.

_nightshift/plan/train.parquet, val.parquet   the images, as `split` writes them
_nightshift/plan/plan.json                    the seal, written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from pipeline.checkpoint import CHECKPOINT_DIR, Position, Row, read_position
from pipeline.curves import EVENTS_DIR, METRICS
from pipeline.export import MODEL_DIR
from pipeline.model_dir import MODEL_FILES
from pipeline.plan import PLAN_DIR, SEAL, make_run_id, read_seal
from pipeline.recipe import UNUSABLE
from pipeline.run import REPORT, RUN, SUCCESS, Account
from pipeline.split import Split
from pipeline.storage import Folder
from pipeline.validation import VALIDATION

JOB: Final = "finetune"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """A sealed plan of a training."""

    run_id: str
    categories: tuple[str, ...]
    num_train: int
    """Images that are listed to train on; some of them may turn out to be unusable."""
    num_val: int
    hash: str
    """Of all images and their classes."""
    given: dict[str, Any]
    """The settings as the user gave them."""
    resolved: dict[str, Any]
    """The settings as they are used: no `auto` is left."""
    job: str = JOB
    format: int = FORMAT


def seal_course(folder: Folder, split: Split, *, hash: str, given: dict[str, Any], resolved: dict[str, Any]) -> Course:
    """Freeze a split that is written already, together with its settings; from here on the run has an id."""
    course = Course(
        run_id=make_run_id(),
        categories=split.categories,
        num_train=len(split.train),
        num_val=len(split.val),
        hash=hash,
        given=given,
        resolved=resolved,
    )
    folder.put(SEAL, json.dumps(asdict(course), indent=1).encode())
    return load_course(folder) or course  # as a resumed run sees it: JSON has no tuples


def load_course(folder: Folder) -> Course | None:
    """The sealed plan in `folder`, or None where there is none; raises OutputError where it is of another kind."""
    fields = read_seal(folder, job=JOB, format=FORMAT)
    return None if fields is None else Course(**{**fields, "categories": tuple(fields["categories"])})


def clear_training(folder: Folder) -> None:
    """Delete what an earlier training left here, and nothing else."""
    for name in (SUCCESS, RUN, METRICS, UNUSABLE, VALIDATION, REPORT):
        folder.delete(name)
    for name in MODEL_FILES:
        folder.delete(f"{MODEL_DIR}/{name}")
    for name in folder.list_names(EVENTS_DIR):
        folder.delete(f"{EVENTS_DIR}/{name}")
    folder.delete_tree(CHECKPOINT_DIR)
    folder.delete_tree(PLAN_DIR)


class TrainingAccount(Account):
    """The account of a training."""

    job = JOB

    def __init__(self, folder: Folder, course: Course, *, started: float) -> None:
        super().__init__(folder, course.run_id, given=course.given, resolved=course.resolved, started=started)
        self.course = course
        self.num_train = course.num_train
        self.num_val = course.num_val
        self.num_unusable = 0
        self.history: list[Row] = []
        self.best_epoch: int | None = None

    @property
    def best(self) -> Row | None:
        """What is known of the best epoch."""
        return None if self.best_epoch is None else self.history[self.best_epoch - 1]

    def describe_stop(self) -> str:
        position = read_position(self._folder, self.run_id)
        if position is None:
            return "stopped before the first checkpoint; the same command starts again"
        return f"stopped: {describe_position(position)} and all before it is kept; the same command continues"

    def _describe(self, invocations: list[dict[str, Any]]) -> dict[str, Any]:
        train_s = sum(self.num_train / row["images_per_s"] for row in self.history)
        return {
            "counts": {"train": self.num_train, "val": self.num_val, "unusable": self.num_unusable},
            "categories": len(self.course.categories),
            "epochs": len(self.history),
            "best": self.best,
            "throughput": {
                "images_per_s": round(self.num_train * len(self.history) / train_s, 2) if train_s else None,
                "seconds": round(sum(invocation["seconds"] for invocation in invocations), 3),
            },
            "plan": {"hash": self.course.hash},
        }


def describe_position(position: Position) -> str:
    """Where a training stands, for people, who count from 1."""
    if position.step:
        return f"epoch {position.epoch + 1} up to step {position.step:,}"
    return f"epoch {position.epoch}"
