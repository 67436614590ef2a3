"""From a command line to a config, and from whatever a job ends with to an exit code."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar, get_type_hints

import tyro
import yaml

from jobs.interrupt import handle_interrupts
from pipeline.errors import ConfigError, PipelineError
from pipeline.secrets import mask

Config = TypeVar("Config")

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_TERMINATED: Final = 128 + signal.SIGTERM


def parse(kind: type[Config], arguments: list[str], *, command: str, description: str) -> Config:
    """The config that `arguments` describe; `--config FILE` gives values that the other flags override.

    Exits with code 0 after `--help`, and with code 2 and the reason where the arguments make no sense.
    """
    arguments, path = _take_config_file(arguments)
    return tyro.cli(
        kind,
        args=arguments,
        default=kind(**(_read_yaml(kind, path) if path else {})),
        prog=f"nightshift {command}",
        description=f"{description}\n\nEvery flag can also stand in a YAML file, given as --config FILE.",
        # Without these, `--include '*.jpg' photos/` would take photos/ for a second pattern.
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction, tyro.conf.DisallowNone),
    )


def to_arguments(config: Any) -> list[str]:
    """The inverse of `parse`: flags for all settings that are not as by default, then what has no flag."""
    flags: list[str] = []
    positional: list[str] = []
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default:
            continue
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            positional += map(str, value if isinstance(value, tuple) else (value,))
        elif isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(field.default, tuple):  # a flag for each
            flags += [word for one in value for word in (flag, str(one))]
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return flags + positional


def run_command(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Call a command's `main`, say in one place what went wrong, and return the exit code."""
    handle_interrupts()
    try:
        return main(arguments)
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        sys.stdout = None  # nothing is left to flush into it
        return 0
    except (PipelineError, OSError) as error:  # an OSError that nobody foresaw says what and where by itself
        if {"-v", "--verbose"} & set(arguments):
            print(mask(traceback.format_exc()), end="", file=sys.stderr)
        else:
            for fault in getattr(error, "faults", (error,)):
                print(f"error: {mask(str(fault))}", file=sys.stderr)
        return getattr(error, "exit_code", PipelineError.exit_code)
    except KeyboardInterrupt as interrupt:  # before or after the work itself, which says what it has kept
        print("stopped", file=sys.stderr)
        return int(interrupt.args[0]) + 128 if interrupt.args else EXIT_INTERRUPTED


def leave(code: int) -> NoReturn:
    """End this process with an exit code; after an interrupt without waiting for threads that wait for a store."""
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or with nobody to read it
                stream.flush()
        atexit._run_exitfuncs()  # Ray's among them, which ends what it has started
        os._exit(code)
    sys.exit(code)


def _take_config_file(arguments: list[str]) -> tuple[list[str], str | None]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], argument.removeprefix("--config=")
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ConfigError("--config: name a YAML file")
            return arguments[:index] + arguments[index + 2 :], arguments[index + 1]
    return arguments, None


def _read_yaml(kind: type[Config], path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: is no mapping of flags to values")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(named.keys() - set(known)):
        faults = (f"--config {path}: unknown setting {name!r}; known are {', '.join(known)}" for name in unknown)
        raise ConfigError(*faults)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
