"""Finished runs without a worker: parts, plan and run.json as a labelling job leaves them, of rows of a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import schema
from pipeline.categories import hash_categories
from pipeline.commit import Counts, commit_part
from pipeline.plan import Plan, Shard, read_shards, seal_plan, write_listing
from pipeline.run import RUN, STATE_DIR, SUCCESS
from pipeline.sources import ListedImage
from pipeline.storage import Folder, open_folder

CLASSES = ("ant", "bee", "cat")


def make_rows(
    uris: Sequence[str],
    scores: Any,
    *,
    categories: Sequence[str],
    targets: Sequence[str | None] | None = None,
    errors: dict[int, str] | None = None,
    top_k: int = 5,
) -> list[dict[str, Any]]:
    """Rows of predictions from (N, C) scores; `errors` are those of the rows that have failed."""
    rows = []
    for index, (uri, own) in enumerate(zip(uris, np.asarray(scores), strict=True)):
        row: dict[str, Any] = dict.fromkeys(schema.PREDICTIONS.names)
        row |= {"uri": uri, "attempts": 1, "model": "model", "run_id": "run"}
        row["target"] = targets[index] if targets is not None else None
        if errors and index in errors:
            row |= {"error_stage": "decode", "error": errors[index]}
        else:
            best = np.argsort(-own, kind="stable")[:top_k].tolist()
            found = [{"label": categories[i], "label_id": i, "score": float(own[i])} for i in best]
            row |= {**found[0], "predictions": found, "width": 60, "height": 48, "size_bytes": 1000}
        rows.append(row)
    return rows


def write_run(
    output: str,
    rows: list[dict[str, Any]],
    *,
    categories: Sequence[str],
    inputs: Sequence[str] = (),
    model: str = "model",
    labels: str | None = None,
    shard_size: int = 64,
    state: str = "done",
    top_k: int = 5,
) -> Folder:
    """A run over these rows, in parts of `shard_size`."""
    folder = open_folder(output, scratch=f"{STATE_DIR}/tmp")
    plan = _write_plan(folder, rows, shard_size)
    counts = Counts()
    for shard in read_shards(folder, plan):
        own = rows[shard.first : shard.first + shard.num_images]
        table = pa.Table.from_pylist(own, schema=schema.PREDICTIONS)
        counts.add(commit_part(folder, Shard(shard.index, shard.first, shard.num_images), table, run_hash="0" * 12))
    account = _make_account(counts, categories, inputs=inputs, model=model, labels=labels, state=state, top_k=top_k)
    folder.put(RUN, json.dumps(account).encode())
    if state == "done":
        folder.put(SUCCESS, b"")
    return folder


def _write_plan(folder: Folder, rows: list[dict[str, Any]], shard_size: int) -> Plan:
    listing = write_listing(folder, (ListedImage(row["uri"]) for row in rows), shard_size=shard_size)
    return seal_plan(folder, listing, given={}, resolved={}, epoch=0)


def _make_account(
    counts: Counts, categories: Sequence[str], *, inputs: Any, model: str, labels: Any, state: str, top_k: int
) -> dict[str, Any]:
    names = tuple(categories)
    fixed = {"sha256": "0" * 64, "num_classes": len(names), "categories_sha256": hash_categories(names)}
    preset = {"resize": 40, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    given = {"inputs": list(inputs), "labels": labels, "top_k": top_k}
    resolved = {**given, **preset, "model": model, "weights": "none", "fixed": fixed, "precision": "fp32"}
    resolved |= {"exif": "ignore", "image_column": None, "max_pixels": 10**8}
    return {
        "job": "label",
        "run_id": "20260101-000000-abcdef",
        "state": state,
        "counts": {"listed": counts.num_images, "labelled": counts.labelled, "failed": counts.num_failed},
        "failures": dict(counts.failed.most_common()),
        "throughput": {"images_per_s": 12.5, "seconds": 75.0},
        "timings": {},
        "model": {"name": model, "weights": "none", "architecture": model, **fixed, "preset": preset},
        "config": {"given": given, "resolved": resolved},
        "cluster": {"num_nodes": 1, "num_cpus": 2.0, "num_gpus": 0.0, "num_workers": 2},
        "versions": {"python": "3.11.7", "nightshift-runner": "0.1.0"},
        "invocations": [
            {"started": "2026-01-01T00:00:00Z", "host": "here", "state": state, "images": 5, "seconds": 75.0}
        ],
    }


def draw_scores(num_images: int, num_classes: int, *, seed: int = 0) -> Any:
    """(N, C) softmax scores, of which some are sure and some are not."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_images, num_classes)) * random.uniform(0.5, 5, size=(num_images, 1))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def write_pictures(folder: Path, names: Sequence[str], *, seed: int = 0) -> list[str]:
    """Small pictures of any names; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for name in names:
        coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((64, 48)).save(folder / name, "JPEG")
    return [str(folder / name) for name in names]
