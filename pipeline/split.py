"""Listed images with their labels → the categories, and the images to train and to validate on.

    _nightshift/plan/train.parquet      one row an image, in the order of the listing, with the id of its class
    _nightshift/plan/val.parquet        the same of those to validate on; no row where there are none
    _nightshift/plan/unlisted.parquet   what was met on the way and cannot be read

Images are gathered in Arrow's columns, a few thousand at a time, so that millions of them fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import ConfigError, NoImagesError, StorageError
from pipeline.listing import Inputs
from pipeline.plan import PLAN_DIR
from pipeline.sources import ListedImage, Selection
from pipeline.sources.base import IMAGE_SUFFIXES, is_skipped, to_text
from pipeline.sources.tree import TreeSource
from pipeline.storage import (
    WEB_SCHEMES,
    Folder,
    Kind,
    describe,
    has_scheme,
    join_key,
    normalise,
    open_store,
    path_to_uri,
    retry,
    split_key,
    uri_to_path,
)
from pipeline.storage.bucket import open_bucket

_TRAIN: Final = "train"
_VALIDATION_NAMES: Final = ("val", "valid", "validation")
_TEST: Final = "test"

UNLISTED: Final = f"{PLAN_DIR}/unlisted.parquet"
_ROWS_PER_BATCH: Final = 4096
# Of the names that a message lists.
_SHOWN: Final = 5
_HASH_BITS: Final = 53  # all of them fit into a float
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")
_CLASS_ID: Final = re.compile(r"[0-9]{1,9}")
_HOW_TO_LABEL: Final = (
    "labels are the names of their folders (--target folder), a column of a Parquet file or manifest (--label-column), "
    "or .cls and .json files beside the images of a tar"
)

Notice = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """What a training is about."""

    categories: tuple[str, ...]
    """The names of the classes in the order of their ids: one a line, none with white space around it."""
    train: pa.Table
    """The images to train on, as `schema.EXAMPLES`."""
    val: pa.Table
    """The images to validate on, likewise; empty where there are to be none."""
    unlisted: pa.Table
    """Entries of both that stand for what could not be listed, as `schema.UNUSABLE`."""


# ---------------------------------------------------------------------------------------------------------------
# Which inputs are for what


def find_sets(
    given: tuple[str, ...], *, val: tuple[str, ...] = (), retries: int = 3, notice: Notice
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The inputs to train on, and those to validate on; None where these are to be split off the others.

    A single folder that holds a folder `train` stands for that, and for the validation folder beside it, unless the
    user named one with `val`. Raises ConfigError where it is not clear which folder that would be.
    """
    folder = _find_folder(given, retries)
    there = {name for name in (_TRAIN, *_VALIDATION_NAMES, _TEST) if folder and _is_folder(f"{folder}/{name}", retries)}
    if folder is None or _TRAIN not in there:
        return given, val or None
    train = (f"{folder}/{_TRAIN}",)
    found = [name for name in _VALIDATION_NAMES if name in there]
    if val:
        named = set(map(normalise, val))
        for name in (*found, *({_TEST} & there)):
            if normalise(f"{folder}/{name}") not in named:
                notice(f"{folder}/{name} is left alone, since --val names other images to validate on")
        return train, val
    if len(found) > 1:
        raise ConfigError(f"{folder} has the folders {_show(found)}: name the one to validate on with --val")
    if found:
        if _TEST in there:
            notice(f"{folder}/{_TEST} is left alone: it is for the finished model")
        return train, (f"{folder}/{found[0]}",)
    if _TEST in there:
        raise ConfigError(
            f"{folder} has the folders 'train' and 'test', and none of {_show(_VALIDATION_NAMES)}: name the images to "
            f"validate on with --val, or give {folder}/{_TRAIN} alone to have some of its images split off for that"
        )
    if others := [name for name in _list_folders(normalise(folder), retries) if name != _TRAIN]:
        notice(
            f"training on {folder}/{_TRAIN} alone, and not on {_show(others)} beside it; "
            f"if all of them are classes, give '{folder}/*'"
        )
    return train, None


def _find_folder(given: tuple[str, ...], retries: int) -> str | None:
    """The only input, without slashes at its end, where that is a folder."""
    is_one = len(given) == 1 and bool(given[0]) and _is_folder(given[0], retries)
    return given[0].rstrip("/") if is_one else None


def _is_folder(given: str, retries: int) -> bool:
    uri = normalise(given)
    if has_scheme(uri) and split_key(uri)[0] in WEB_SCHEMES:
        return False

    def find_kind() -> Kind | None:
        return open_store(uri).find_kind(uri)

    try:
        return retry(find_kind, retries=retries)[0] == "folder"
    except OSError as error:
        raise StorageError(f"cannot read {uri}: {': '.join(describe(error))}") from error


def _list_folders(uri: str, retries: int) -> list[str]:
    """The names of the folders directly in a folder, sorted; hidden ones are passed over."""

    def list_folders() -> list[str]:
        if has_scheme(uri):
            entries = open_bucket(*split_key(uri)[:2]).list_folder(uri)
            return [entry.name for entry in entries if entry.kind == "folder" and entry.name != "/"]
        with os.scandir(uri_to_path(uri)) as scan:
            return sorted(e.name for e in scan if not e.is_file(follow_symlinks=False) and os.path.isdir(e.path))

    try:
        return [name for name in retry(list_folders, retries=retries)[0] if not is_skipped(name)]
    except FileNotFoundError:  # an empty bucket has no folders
        return []
    except OSError as error:
        raise StorageError(f"cannot list {uri}: {': '.join(describe(error))}") from error


# ---------------------------------------------------------------------------------------------------------------
# Which images are for what


def split_images(train: Inputs, val: Inputs | None, *, val_fraction: float, notice: Notice) -> Split:
    """List the images to train on, and those to validate on; without `val`, a fraction of the former.

    Then an image belongs to validation where a hash of its URI, in [0, 1), is below `val_fraction`: it stays where it
    is when others are added. Where that would leave a class of at least two images without any to validate on, its
    image of the lowest hash is moved there; without any to train on, that of the highest moves back. The only image
    of a class is trained on.

    Raises ConfigError, with all that stands in the way of a training.
    """
    faults: list[str] = []
    unlisted: list[pa.RecordBatch] = []
    trained = _gather(train, "train", unlisted, faults, notice)
    validated = _gather(val, "validate", unlisted, faults, notice) if val is not None else None

    categories = _find_categories(trained.targets, train.class_names, notice)
    ids = {name: number for number, name in enumerate(categories)}
    val_ids: Mapping[str, int] = ids
    if trained.targets:
        faults += _check_categories(categories, trained)
        faults += find_empty_classes(train, trained.table)
    if trained.targets and validated is not None:
        val_ids = _find_val_ids(validated.targets, ids, notice)
        faults += _check_known(validated, val_ids)
    if faults:
        raise ConfigError(*faults)

    examples = _number(trained.table, ids)
    if validated is None:
        examples, val_examples = _split_off(examples, len(categories), val_fraction)
    else:
        val_examples = _number(validated.table, val_ids)
        if num_both := pc.sum(pc.is_in(examples["uri"], value_set=val_examples["uri"])).as_py():
            notice(f"{num_both:,} images are both trained on and validated on: the results will look too good")
    if len(val_examples):
        present = set(pc.unique(val_examples["label_id"]).to_pylist())
        if lacking := [name for name, number in ids.items() if number not in present]:
            notice(f"{len(lacking):,} of {len(ids):,} classes have no image to validate on: {_show(lacking)}")
    return Split(
        categories=categories,
        train=examples,
        val=val_examples,
        unlisted=pa.Table.from_batches(unlisted, schema.UNUSABLE),
    )


class _Gathered(NamedTuple):
    """The images of one set."""

    table: pa.Table
    """Those with a label, as `schema.PLAN`."""
    targets: list[str]
    """Their distinct labels."""


def _gather(
    inputs: Inputs, purpose: str, unlisted: list[pa.RecordBatch], faults: list[str], notice: Notice
) -> _Gathered:
    """List `inputs`; what cannot be listed is added to `unlisted`, and if nothing else is there, to `faults`."""
    batches: list[pa.RecordBatch] = []
    num_unlabelled, num_broken = 0, 0
    first_unlabelled, first_broken = "", ""
    images = inputs.list_images()
    try:
        while rows := list(islice(images, _ROWS_PER_BATCH)):
            labelled: list[ListedImage] = []
            broken: list[tuple[str, str, str]] = []
            for image in rows:
                target = (image.target or "").strip()
                if image.error is not None:
                    broken.append((image.uri, "list", image.error[: schema.MAX_ERROR_CHARS]))
                elif target:
                    labelled.append(image if target == image.target else image._replace(target=target))
                else:
                    num_unlabelled += 1
                    first_unlabelled = first_unlabelled or image.uri
            if labelled:
                batches.append(_to_batch(labelled, schema.PLAN))
            if broken:
                unlisted.append(_to_batch(broken, schema.UNUSABLE))
                num_broken += len(broken)
                first_broken = first_broken or f"{broken[0][0]}: {broken[0][2]}"
    except NoImagesError as error:
        faults += error.faults
    if num_unlabelled and not batches:
        faults.append(
            f"none of the {num_unlabelled:,} images to {purpose} on has a label, such as {first_unlabelled}: "
            f"{_HOW_TO_LABEL}"
        )
    elif num_unlabelled:
        notice(
            f"{num_unlabelled:,} images to {purpose} on are left out: they have no label, such as {first_unlabelled}"
        )
    elif num_broken and not batches:
        faults.append(f"nothing to {purpose} on can be read, such as {first_broken}")
    table = pa.Table.from_batches(batches, schema.PLAN)
    return _Gathered(table, pc.unique(table["target"]).to_pylist())


def _to_batch(rows: Iterable[Sequence[object]], columns: pa.Schema) -> pa.RecordBatch:
    cells = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(cells, columns, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def _number(table: pa.Table, ids: Mapping[str, int]) -> pa.Table:
    """The images with the ids of their classes."""
    codes = pc.index_in(table["target"], value_set=pa.array(list(ids), pa.string()))
    label_ids = pa.array(list(ids.values()), pa.int32()).take(codes)
    return pa.Table.from_arrays([*table.columns, label_ids], schema=schema.EXAMPLES)


def _split_off(examples: pa.Table, num_classes: int, val_fraction: float) -> tuple[pa.Table, pa.Table]:
    """The images to train on, and a fraction of them to validate on: see `split_images`."""
    if val_fraction == 0:
        return examples, examples.slice(0, 0)
    label_ids = examples["label_id"].to_numpy()
    hashes = _hash(examples["uri"])
    is_val = hashes < val_fraction
    counts = np.bincount(label_ids, minlength=num_classes)
    num_val = np.bincount(label_ids[is_val], minlength=num_classes)
    order = np.lexsort((hashes, label_ids))  # by class, and there by hash
    ends = np.cumsum(counts)
    lowest, highest = order[ends - counts], order[ends - 1]
    is_val[lowest[(num_val == 0) & (counts > 1)]] = True
    is_val[highest[num_val == counts]] = False
    if not is_val.any():
        raise ConfigError(
            "no image is left to validate on, since each class has a single one: add images, or train without "
            "validation (--val-fraction 0)"
        )
    return examples.filter(pa.array(~is_val)), examples.filter(pa.array(is_val))


def _hash(uris: pa.ChunkedArray) -> NDArray[np.float64]:
    """A number in [0, 1) for each URI, the same everywhere and always."""

    def hash_one(uri: str) -> float:
        digest = hashlib.blake2b(uri.encode(), digest_size=8).digest()
        return float(int.from_bytes(digest, "big") >> (64 - _HASH_BITS)) / 2.0**_HASH_BITS

    each = (uri for chunk in uris.chunks for uri in chunk.to_pylist())
    return np.fromiter(map(hash_one, each), np.float64, len(uris))


# ---------------------------------------------------------------------------------------------------------------
# Categories


def _find_categories(
    targets: Collection[str], declared: Collection[tuple[str, ...]], notice: Notice
) -> tuple[str, ...]:
    """The names of the classes: as a table declares them, or else sorted, by number where all of them are numbers."""
    orders = {tuple(dict.fromkeys(name.strip() for name in names)) for names in declared}
    if len(orders) > 1:
        notice("tables name their classes in different orders: they are sorted by name instead")
    elif orders:
        (names,) = orders
        foreign = sorted(set(targets) - set(names))
        if not foreign:
            return names
        notice(f"labels that are not among the classes of a table, {_show(foreign)}: all are sorted by name instead")
    if all(map(_INTEGER.fullmatch, targets)):
        return tuple(sorted(targets, key=lambda name: (int(name), name)))
    return tuple(sorted(targets))


def _check_categories(categories: tuple[str, ...], trained: _Gathered) -> Iterator[str]:
    if broken := [name for name in categories if len(name.splitlines()) > 1]:
        yield f"the names of classes cannot have line breaks: {_show(broken)}"
    if len(categories) == 1:
        yield f"all images to train on are of one class, {categories[0]!r}: a training takes at least two"
    present = set(trained.targets)
    if missing := [name for name in categories if name not in present]:
        yield f"{len(missing):,} of {len(categories):,} classes have no image to train on: {_show(missing)}"


def _check_known(validated: _Gathered, val_ids: Mapping[str, int]) -> Iterator[str]:
    if foreign := [name for name in validated.targets if name not in val_ids]:
        example = validated.table["uri"][pc.index(validated.table["target"], foreign[0]).as_py()]
        yield f"there are classes to validate on, and not to train on: {_show(foreign)} (the first one with {example})"


def _find_val_ids(targets: Collection[str], ids: Mapping[str, int], notice: Notice) -> Mapping[str, int]:
    """What the labels to validate with mean: names of classes, or, where none of them is one, class ids."""
    if not targets or any(name in ids for name in targets) or all(map(_INTEGER.fullmatch, ids)):
        return ids
    if not all(_CLASS_ID.fullmatch(target) and int(target) < len(ids) for target in targets):
        return ids
    names = list(ids)
    notice(
        f"the labels to validate with are no names of classes, and are taken for their ids: "
        f"0 is {names[0]!r}, {len(names) - 1} is {names[-1]!r}"
    )
    return {target: int(target) for target in targets}


def find_empty_classes(inputs: Inputs, labelled: pa.Table) -> list[str]:
    """A fault for each folder right in one of `inputs` that should be a class, and gave none of the `labelled` images.

    So it is with such an input itself, where it has no folders. Only folders give their names to classes, and only
    where the user wants that; one that --include or --exclude leave out as a whole is meant to be empty.
    """
    targets = set(pc.unique(labelled["target"]).to_pylist())
    faults: list[str] = []
    for tree in inputs.trees:
        for name, prefix in _list_class_folders(tree) if tree.options.target == "folder" else ():
            if to_text(name).strip() not in targets and not _has_any_below(labelled["uri"], prefix):
                place = prefix if has_scheme(prefix) else uri_to_path(prefix)
                is_below = prefix != _child_prefix(tree.uri)
                hint = f" (if it is no class: --exclude '{to_text(name)}/**')" if is_below else ""
                faults.append(f"class {to_text(name)!r} has no images to train on: {place.rstrip('/')}{hint}")
    if (more := len(faults) - _SHOWN) > 0:
        faults[_SHOWN:] = [f"and {more:,} more classes have no images to train on"]
    return faults


def _list_class_folders(tree: TreeSource) -> Iterator[tuple[str, str]]:
    """The names of folders that should be classes, and how the URIs of all that lies in them begin."""
    options = tree.options
    names = _list_folders(tree.uri, options.retries)
    for name in names:
        prefix = _child_prefix(tree.uri, name)
        is_named = tree.pattern is None or tree.pattern.matches(name)
        if is_named and _may_hold_images(name, options.selection) and not _is_above(prefix, options.output):
            yield name, prefix
    if not names and tree.pattern is None:
        prefix = _child_prefix(tree.uri)
        yield prefix.rstrip("/").rpartition("/")[2], prefix


def _child_prefix(folder: str, name: str = "") -> str:
    """How the URIs of all that lies in a folder, or in the one called `name` in it, begin."""
    if not has_scheme(folder):
        return path_to_uri(os.path.join(uri_to_path(folder), name, ""))
    scheme, bucket, key = split_key(folder)
    return join_key(scheme, bucket, "".join(f"{part}/" for part in (key, name) if part))


def _may_hold_images(name: str, selection: Selection) -> bool:
    return any(selection.takes(f"{name}/0{suffix}") for suffix in IMAGE_SUFFIXES)


def _is_above(prefix: str, output: str | None) -> bool:
    """Whether the output is, or lies in, the folder whose URIs begin so."""
    if output is None or has_scheme(prefix) or has_scheme(output):
        return f"{output}/".startswith(prefix)
    return os.path.join(os.path.realpath(uri_to_path(output)), "").startswith(
        os.path.join(os.path.realpath(uri_to_path(prefix)), "")
    )


def _has_any_below(uris: pa.ChunkedArray, prefix: str) -> bool:
    """Whether any of the images lies below a folder, by itself or in an archive."""
    own, in_archive = pc.starts_with(uris, prefix), pc.match_substring(uris, f"::{prefix}")
    return bool(pc.any(pc.or_(own, in_archive)).as_py())


def _show(names: Iterable[str]) -> str:
    """The first few names."""
    listed = list(names)
    shown = ", ".join(map(repr, listed[:_SHOWN]))
    return shown if len(listed) <= _SHOWN else f"{shown} and {len(listed) - _SHOWN:,} more"


# ---------------------------------------------------------------------------------------------------------------
# On disk


def write_split(folder: Folder, split: Split) -> str:
    """Keep the images of a training; returns a hash of the categories and of every row, however they are encoded."""
    digest = hashlib.sha256(json.dumps(split.categories).encode())
    for name, table in (("train", split.train), ("val", split.val)):
        digest.update(f"{name} {len(table)}".encode())
        for first in range(0, len(table), _ROWS_PER_BATCH):
            columns = [column.to_pylist() for column in table.slice(first, _ROWS_PER_BATCH).columns]
            digest.update(repr(columns).encode())  # says where each cell ends, and tells none from an empty one
        with folder.open_write(_examples_name(name)) as file:
            pq.write_table(
                table,
                file,
                compression="zstd",
                # Neighbouring URIs share most of their beginning, which delta encoding stores once.
                use_dictionary=["target", "error", "unit", "label_id"],
                column_encoding={
                    "uri": "DELTA_BYTE_ARRAY",
                    "offset": "DELTA_BINARY_PACKED",
                    "size": "DELTA_BINARY_PACKED",
                },
                write_statistics=False,
                row_group_size=schema.MAX_ROW_GROUP_ROWS,
            )
    with folder.open_write(UNLISTED) as file:
        pq.write_table(split.unlisted, file, compression="zstd")
    return digest.hexdigest()


def read_examples(folder: Folder, name: Literal["train", "val"]) -> pa.Table:
    """One set of images as `write_split` wrote it."""
    return _read_table(folder, _examples_name(name), schema.EXAMPLES)


def read_unlisted(folder: Folder) -> pa.Table:
    """What could not be listed, as `write_split` wrote it."""
    return _read_table(folder, UNLISTED, schema.UNUSABLE)


def to_images(table: pa.Table, rows: Sequence[int]) -> list[ListedImage]:
    """The images of some rows of a set, in their order."""
    columns = table.columns[: len(schema.PLAN)]
    if isinstance(rows, range) and rows.step == 1:
        cells = [column.slice(rows.start, len(rows)).to_pylist() for column in columns]
    else:  # cell by cell: `take` puts the chunks of all columns together first
        cells = [[column[row].as_py() for row in rows] for column in columns]
    return list(map(ListedImage, *cells))


def _read_table(folder: Folder, name: str, columns: pa.Schema) -> pa.Table:
    # Not by `read_table`, which imports pandas for that, in each worker.
    with folder.open_read(name) as source, pq.ParquetFile(source) as file:
        return file.read().cast(columns)


def _examples_name(name: str) -> str:
    return f"{PLAN_DIR}/{name}.parquet"
