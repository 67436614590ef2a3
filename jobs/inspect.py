"""Say what a command would read, without reading it: kinds, counts, bytes, formats, labels, shards.

nightshift inspect photos/ archive.tar 's3://bucket/shard-{000..127}.tar'
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections import Counter
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final

import tyro

from jobs.cli import leave, parse, run_command
from jobs.inputs import InputConfig
from pipeline.errors import ConfigError
from pipeline.listing import Inputs
from pipeline.plan import find_shard_size
from pipeline.summary import Summary, summarise
from pipeline.terminal import Progress, describe_counts, escape_controls, format_bytes

_SHOWN_LABELS: Final = 10
_WORDS: Final = {
    "file": ("file", "files"),
    "tar": ("tar", "tars"),
    "zip": ("zip", "zips"),
    "parquet": ("Parquet file", "Parquet files"),
    "web": ("address on the web", "addresses on the web"),
}


@dataclass(frozen=True, kw_only=True)
class InspectConfig(InputConfig):
    """Settings of an inspection."""

    json: bool = False
    """Print one JSON document."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """No progress and no notices."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""


def run(config: InspectConfig) -> tuple[Summary, Inputs]:
    """List all of `config.inputs` and count; raises NoImagesError where there is nothing, or an input is missing."""
    if not config.inputs:
        raise ConfigError("INPUT: name at least one folder or file")
    inputs = config.open_inputs()
    with Progress(sys.stderr, is_quiet=config.quiet) as progress:
        images = progress.count(inputs.list_images(), "listing: {:,} images")
        summary = summarise(images, retries=config.retries, image_column=config.image_column)
        for notice in inputs.notices:
            progress.notice(notice)
    return summary, inputs


def describe(summary: Summary, inputs: Inputs) -> str:
    """The summary in the words of a person."""
    places = []
    for kind, count in summary.kinds.most_common():
        number = summary.containers[kind]
        word = _WORDS[kind][(number or count) != 1]
        places.append(f"{count:,} in {number:,} {word}" if number else f"{count:,} {word}")
    size = find_shard_size(summary.num_images)
    num_shards, largest = summary.count_shards(size)
    lines = [
        f"images   {summary.num_images - summary.num_errors:,}: {', '.join(places) or 'none that can be read'}",
        f"bytes    {_describe_bytes(summary)}",
        f"formats  {describe_counts(summary.formats)}",
        f"labels   {_describe_labels(summary)}",
        f"shards   {num_shards:,} of up to {largest:,} images",
    ]
    if inputs.num_repeated:
        lines.append(f"repeated {inputs.num_repeated:,} times an image is named that was named before; it is read once")
    lines += [f"skipped  {describe_counts(inputs.skipped)}"] if inputs.skipped else []
    if summary.num_errors:
        lines.append(f"unread   {summary.num_errors:,} that become failed rows:")
        lines += [f"  {uri}: {error}" for uri, error in summary.errors.items()]
        more = summary.num_errors - len(summary.errors)
        lines += [f"  and {more:,} more"] if more else []
    return "\n".join(map(escape_controls, lines))


def to_json(summary: Summary, inputs: Inputs) -> dict[str, Any]:
    """The summary as one document."""
    size = find_shard_size(summary.num_images)
    num_shards, largest = summary.count_shards(size)
    values = {field.name: getattr(summary, field.name) for field in fields(summary) if field.name != "units"}
    return {
        **{name: dict(value.most_common()) if isinstance(value, Counter) else value for name, value in values.items()},
        "num_repeated": inputs.num_repeated,
        "skipped": dict(inputs.skipped.most_common()),
        "shards": {"count": num_shards, "shard_size": size, "largest": largest},
    }


def _describe_labels(summary: Summary) -> str:
    if not summary.labels:
        return "none"
    shown = ", ".join(f"{label} {count:,}" for label, count in summary.labels.most_common(_SHOWN_LABELS))
    more = f", and {len(summary.labels) - _SHOWN_LABELS:,} more" if len(summary.labels) > _SHOWN_LABELS else ""
    at_least = "at least " if summary.num_other_labels else ""
    num_labelled = summary.labels.total() + summary.num_other_labels
    return f"{at_least}{len(summary.labels):,} on {num_labelled:,} images: {shown}{more}"


def _describe_bytes(summary: Summary) -> str:
    known = format_bytes(summary.num_bytes)
    return f"{known}, with {summary.num_unsized:,} of unknown size" if summary.num_unsized else known


def main(arguments: list[str]) -> int:
    """The command `nightshift inspect`."""
    purpose = "Say what a command would read: kinds, counts, bytes, formats, labels, and the shards that label makes."
    config = parse(InspectConfig, arguments, command="inspect", description=purpose)
    found = run(config)
    print(jsonlib.dumps(to_json(*found), indent=2) if config.json else describe(*found))
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
