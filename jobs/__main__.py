"""The command table: `nightshift COMMAND …` is `python -m jobs.COMMAND …`."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Final

from jobs.cli import leave, run_command

COMMANDS: Final = {
    "label": "label every image of an archive with a pretrained model",
    "embed": "turn every image of an archive into a vector of features",
    "evaluate": "say how good labels are, of images whose classes are known",
    "report": "make one page to look at of a run that labelled, evaluated or fine-tuned",
    "finetune": "fine-tune a pretrained model on labelled images",
    "submit": "run such a command on a Ray cluster: nightshift submit -- label …",
    "status": "list what a cluster is running and has run, and how far it has come",
    "logs": "print or follow the log of a submitted job",
    "stop": "stop a submitted job so that it can be continued",
    "models": "list the models that are known by name, with their cost and accuracy",
    "inspect": "say what would be read: kinds, counts, bytes, formats, labels, shards",
    "doctor": "say whether this machine and the cluster are fit for a run, and what to do where they are not",
    "demo": "see it work: the whole loop on handwritten digits, on this machine, offline",
}

_USAGE: Final = "\n".join(
    [
        "usage: nightshift COMMAND …",
        "",
        *(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items()),
        "",
        "nightshift COMMAND --help tells more; nightshift --version tells the version",
    ]
)


def main() -> None:
    """Find the command, import only its module, and exit with its code."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help", *_]:
            print(_USAGE)
            sys.exit(0 if len(sys.argv) > 1 else 2)
        case ["--version"]:
            print(importlib.metadata.version("nightshift-runner"))
        case [name, *arguments] if name in COMMANDS:
            leave(run_command(importlib.import_module(f"jobs.{name}").main, arguments))
        case [name, *_]:
            print(f"error: unknown command {name!r}\n\n{_USAGE}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
