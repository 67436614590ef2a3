"""A run, finished or not → one page of HTML that needs nothing beside it: no network, no other file.

account ─ labels or training ─ thumbnails ─ template ─ report.html

Names of files and classes come from strangers: every text goes through the template's escaping, and the page forbids
its reader's browser, by a Content-Security-Policy, to run any script but its own, and to load anything at all.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.errors import OutputError
from pipeline.report.labels import gather_labels
from pipeline.report.thumbnails import make_thumbnails
from pipeline.run import open_account
from pipeline.secrets import mask, mask_settings
from pipeline.storage import Folder
from pipeline.storage.uri import locate
from pipeline.terminal import format_bytes, format_seconds

MAX_BYTES: Final = 5_000_000
_HERE: Final = Path(__file__).parent
_SHOWN_SETTINGS: Final = (
    "inputs include exclude target image_column label_column limit top_k precision preprocess exif".split()
)
_SHOWN_RECIPE: Final = (
    "epochs global_batch_size num_workers optimizer lr backbone_lr_scale weight_decay scheduler warmup_epochs "
    "label_smoothing freeze unfreeze_epoch augment frozen_augment mixup cutmix ema class_weights sampling patience "
    "precision seed"
).split()

Tell = Callable[[str], None]
"""Takes what is being done."""


def read_account(folder: Folder) -> dict[str, Any]:
    """run.json; raises OutputError where there is none, or none that a report can be made of."""
    account = open_account(folder)
    if (job := account.get("job", "label")) not in ("label", "finetune"):
        raise OutputError(f"{folder.locate()!r} holds a run of `nightshift {job}`; reports are of label and finetune")
    return account


def compose_report(folder: Folder, account: dict[str, Any], *, retries: int, tell: Tell = lambda text: None) -> str:
    """The page of a run, as HTML."""
    resolved = account["config"]["resolved"]
    found: Any
    if account["job"] == "finetune":
        from pipeline.report.training import gather_course  # here, since torch takes seconds to import

        found = gather_course(folder, account, tell=tell)
    else:
        tell("drawing samples")
        found = gather_labels(folder, account)
    total = len(set(found.uris))
    thumbnails = make_thumbnails(
        found.uris,
        exif=resolved["exif"],
        max_pixels=resolved["max_pixels"],
        image_column=resolved["image_column"],
        retries=retries,
        tell=lambda number: tell(f"reading images: {number:,}/{total:,}"),
    )
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    page: str = _open_template().render(
        account=account,
        found=found,
        evaluation=found.evaluation,
        thumbnails=thumbnails,
        settings=_describe_settings(account),
        output=mask(folder.locate()),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=(_HERE / "style.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.lstrip()


def _open_template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": lambda value: f"{value:,}",
        "percent": lambda value, digits=1: "-" if value is None else f"{100 * value:.{digits}f}\u00a0%",
        "seconds": format_seconds,
        "bytes": format_bytes,
        "name": find_name,
        "mask": mask,
        "width": lambda value: f"{value:.2f}",
    }
    return environment.get_template("page.html.j2")


def find_name(uri: str) -> str:
    """What an image is called, without the place that it lies in."""
    location = locate(uri)
    name = (location.member or location.container).rstrip("/").rpartition("/")[2]
    return name if location.row is None else f"{name}, row {location.row:,}"


def _describe_settings(account: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that somebody who looks at the results wants to know, as they were resolved."""
    resolved = mask_settings(account["config"]["resolved"])
    recipe = resolved.get("recipe", {})
    settings = {name.replace("_", " "): resolved[name] for name in _SHOWN_SETTINGS if resolved.get(name)}
    settings |= {name.replace("_", " "): recipe[name] for name in _SHOWN_RECIPE if recipe.get(name)}
    return [(name, _to_text(value)) for name, value in settings.items()]


def _to_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
