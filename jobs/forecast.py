"""What a run over an archive would take: counts, shards, disk and time, without doing any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import plan as plans
from pipeline.summary import summarise
from pipeline.terminal import format_seconds

if TYPE_CHECKING:
    from jobs.archive import ArchiveConfig


def describe_forecast(config: ArchiveConfig) -> str:
    """List the inputs, and say in the words of a person what the run would be."""
    inputs = config.open_inputs(output=config.output, limit=config.limit)
    summary = summarise(inputs.list_images(), retries=config.retries, image_column=config.image_column)
    num_images, num_unread = summary.num_images, summary.num_errors
    size = config.shard_size
    if size == "auto":
        size = plans.find_shard_size(num_images, max_shard_size=config.max_shard_size)
    num_shards, largest = summary.count_shards(size)
    hours = [f"{format_seconds(num_images / speed)} at {speed:,} images/s" for speed in (100, 1_000)]
    lines = [
        f"images  {num_images:,}" + (f", {num_unread:,} of them entries that cannot be read" if num_unread else ""),
        f"shards  {num_shards:,} of up to {largest:,} images",
        f"disk    about {num_images * config.count_bytes() / 1e6:,.1f} MB of {config.yields}",
        f"time    {', '.join(hours)}",
        *(f"skipped {count:,} {kind}" for kind, count in inputs.skipped.most_common()),
    ]
    return "\n".join(lines)
