"""Everything that nightshift raises on purpose, and the exit code each of them ends a command with.

PipelineError                  1   the run failed or was stopped early
├── UsageError                 2   the command cannot be carried out as it was given
│   ├── ConfigError            2   flags with values that cannot work, all of them at once
│   ├── NoImagesError          2   an input that is missing, or holds no image
│   ├── ModelError             2   a model or its weights cannot be had
│   ├── OutputError            2   the output folder cannot be used for this run
│   └── LeaseHeldError         2   another run is working on the same output
├── ClusterError               4   no Ray cluster can be reached or started
├── StorageError               1   a store refuses, after all retries, or cannot be reached
├── WorkerError                1   workers cannot start, or fail on one shard after the other
├── InterruptedRunError  130/143   Ctrl-C or SIGTERM
└── ImageError                     one image; becomes a failed row and never ends a run
    ├── ReadError                  its bytes cannot be had
    └── DecodeError                its bytes are no picture that could be labelled
"""

from __future__ import annotations


class PipelineError(Exception):
    """The root of all errors that nightshift raises on purpose."""

    exit_code = 1


class UsageError(PipelineError):
    """The command cannot be carried out as it was given, for each of the `faults`; nothing was started."""

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class ConfigError(UsageError):
    """Flags have values that cannot work."""


class NoImagesError(UsageError):
    """An input does not exist, or all inputs together hold no image."""


class ModelError(UsageError):
    """A model is unknown, its weights are missing or do not fit, or its classes have no names."""


class OutputError(UsageError):
    """The output folder belongs to something else, or to a run with other settings."""


class LeaseHeldError(UsageError):
    """Another live run holds the lease of the same output folder."""


class ClusterError(PipelineError):
    """No Ray cluster can be reached at the address given, or none can be started here."""

    exit_code = 4


class StorageError(PipelineError):
    """A file system or object store refuses after all retries, so that nobody can tell what it holds."""


class DamagedRunError(PipelineError):
    """Parts of a run are damaged or missing: it is not finished any more, and the same command does them again."""


class LeaseLostError(PipelineError):
    """Another run took the output folder over, since this one gave no sign of life: it must not write there."""


class TooManyFailuresError(PipelineError):
    """So many images fail that the run cannot become a success, or something else than the images is broken."""


class WorkerError(PipelineError):
    """Workers cannot start, or fail for a reason that lies in no single image."""


class InterruptedRunError(PipelineError):
    """The run was interrupted by a signal: what is committed stays, the rest is redone by the same command."""

    def __init__(self, message: str, *, signal: int) -> None:
        self.exit_code = 128 + signal
        super().__init__(message)


class ImageError(PipelineError):
    """The reason why one image has no label; `str()` of it is the row's `error`."""

    def __init__(self, kind: str, message: str, *, attempts: int = 1) -> None:
        self.kind = kind
        self.attempts = attempts
        super().__init__(f"{kind}: {message}" if message else kind)


class ReadError(ImageError):
    """The bytes of an image cannot be had: missing, forbidden, no regular file, or too many."""


class DecodeError(ImageError):
    """The bytes of an image are no picture that could be labelled: truncated, unknown, or too large."""
