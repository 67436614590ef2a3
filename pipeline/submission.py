"""What travels to a cluster, and what can be known to go wrong there before anything is sent.

    config of the command ─ places · resources · versions · folder to upload ─ faults, all at once ─ entrypoint

Nothing that was pickled travels, only source: `jobs` and `pipeline` as they are here, run by the cluster's own Python
and Ray. Nothing here imports Ray, except for the rules by which it leaves files out of an upload.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.jobserver import Site
from pipeline.secrets import mask
from pipeline.storage import has_scheme, uri_to_path
from pipeline.terminal import format_bytes

# What pyproject.toml allows, from the first to before the last.
PYTHON_VERSIONS: Final = ((3, 11), (3, 14))
RAY_VERSIONS: Final = ((2, 59), (2, 64))
# The dashboard takes no larger request; what Ray itself could store, 512 MiB, can only be sent from within the cluster.
MAX_UPLOAD_BYTES: Final = 100 * 1024 * 1024
MAX_NAME_LENGTH: Final = 128
# A file's headers in a zip file, beside its name, which stands there twice.
_ZIP_BYTES_PER_FILE: Final = 76
_SHOWN_ENTRIES: Final = 5
# A folder that is nearly all of another one is shown in its place.
_DOMINANT: Final = 0.8
# What Ray leaves out of a working directory in any case.
_LEFT_OUT: Final = (".git", ".venv", "venv", "__pycache__")
_IGNORE_FILES: Final = (".gitignore", ".rayignore")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NETWORK_FILE_SYSTEMS: Final = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|lustre|ceph|glusterfs|beegfs\w*|gpfs|afs|9p|virtiofs|fuse\.(?!portal|snapfuse|lxcfs).+"
)
# Packages of ours; another folder of the same name would hide them.
PACKAGES: Final = ("jobs", "pipeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A setting of the submitted command that names a file or folder."""

    name: str
    flag: str
    value: str
    is_read_by_all: bool
    """By every worker, and not only by the job's driver."""
    must_exist: bool = True

    @property
    def path(self) -> str | None:
        """The local path that it is, or None for a URI."""
        if self.value.lower().startswith("file://"):
            return uri_to_path(self.value[len("file://") :].removeprefix("localhost"))
        return None if has_scheme(self.value) else self.value


def check_name(name: str) -> Iterator[str]:
    """Faults of an id that a user has chosen for a job."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        yield f"--name {name!r}: may have up to {MAX_NAME_LENGTH} letters, digits, dots, dashes and underscores"


def read_env(given: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The variables of `K=V` and `K`, which takes its value from here, and the faults among them."""
    env, faults = {}, []
    for text in given:
        name, separator, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            faults.append(f"--env {mask(text)}: is not K=V, nor the name of a variable")
        elif not separator and name not in os.environ:
            faults.append(f"--env {name}: is not set here; give its value as {name}=…")
        else:
            env[name] = value if separator else os.environ[name]
    return env, faults


# ---------------------------------------------------------------------------------------------------------------
# The cluster


def check_versions(site: Site) -> Iterator[str]:
    """Faults of the cluster's Python and Ray: other than here is fine, as long as it is one that runs our source."""
    for name, version, (first, end) in (
        ("Ray", site.ray_version, RAY_VERSIONS),
        ("Python", site.python_version, PYTHON_VERSIONS),
    ):
        if version and not first <= _parse_version(version) < end:
            known = f"{first[0]}.{first[1]} to {end[0]}.{end[1] - 1}"
            yield f"the cluster runs {name} {version}, and nightshift needs {known} there"


def describe_difference(site: Site) -> str | None:
    """What is worth knowing of versions that differ from those here, without being a fault."""
    here = platform.python_version()
    if site.python_version and _parse_version(site.python_version) != _parse_version(here):
        return f"the cluster runs Python {site.python_version}, and this machine {here}; only source travels"
    return None


def _parse_version(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def check_resources(
    site: Site, *, num_workers: str, cpus_per_worker: float | None, gpus_per_worker: float | None
) -> Iterator[str]:
    """Faults of workers that the cluster could never start; None and `auto` follow what it has."""
    if site.can_grow:
        return  # it tells neither what kinds of nodes it can add nor how many
    gpus = gpus_per_worker if gpus_per_worker is not None else float(site.total("GPU") > 0)
    low = 1 if num_workers == "auto" else int(num_workers.split("..")[0])
    for name, flag, needed in (("GPU", "gpus", gpus), ("CPU", "cpus", cpus_per_worker)):
        if not needed:
            continue
        most, total = site.largest(name), site.total(name)
        if needed > most:
            has = f"no node has more than {most:g}" if most else "it has none"
            yield f"--{flag}-per-worker {needed:g}: the cluster cannot give a worker {needed:g} {name}s, {has}"
        elif low * needed > total:
            yield (
                f"--num-workers {num_workers}: {low} workers with {needed:g} {name} each need {low * needed:g}, and "
                f"the cluster has {total:g} and no autoscaler to add some"
            )


def find_unreachable(
    place: Place, site: Site, *, shared: Sequence[str], has_shipped: Callable[[str], bool]
) -> str | None:
    """Why the cluster cannot see a place, or None where it can, or where that cannot be known.

    `shared` are folders that every node sees as this machine does; `has_shipped` tells whether a file or folder is in
    the upload.
    """
    path = place.path
    if path is None:
        return None
    absolute = os.path.abspath(path)
    exists = os.path.lexists(absolute) or any(character in path for character in "*?[{")
    if site.is_here:
        return f"{place.flag} {path}: does not exist" if place.must_exist and not exists else None
    if any(_is_below(absolute, os.path.abspath(folder)) for folder in shared) or _is_on_network(absolute):
        return None
    if not place.is_read_by_all and has_shipped(absolute):
        return None
    if os.path.isabs(path) and not exists and not os.path.isdir(os.path.dirname(absolute)):
        return None  # a path of the cluster's
    where = "is on this machine, and the nodes of the cluster cannot see it"
    remedy = "use a bucket, or a file system that all share, and name that with --shared"
    if not place.is_read_by_all:
        remedy += "; or send it along in a --working-dir"
    return f"{place.flag} {path}: {where}; {remedy}"


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _is_on_network(path: str) -> bool:
    """Whether a path lies on a file system that other machines mount as well."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if _is_below(path, mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and _NETWORK_FILE_SYSTEMS.fullmatch(nearest.fstype) is not None


# ---------------------------------------------------------------------------------------------------------------
# What is uploaded


class Upload:
    """The files of a folder that Ray would upload: none that .gitignore, .rayignore or Ray itself leave out."""

    def __init__(self, folder: str) -> None:
        """Walk through `folder`; reads no file but the ignore files."""
        self.folder = os.path.abspath(folder)
        self.num_bytes = 0  # of the zip file that Ray makes of it, without compressing anything
        self._sizes: Counter[str] = Counter()  # of each file and folder, relative to the folder
        for path, size in _walk(Path(self.folder)):
            self.num_bytes += size + _ZIP_BYTES_PER_FILE + 2 * len(os.fsencode(path))
            self._sizes[path] += size
            for parent in Path(path).parents:
                self._sizes[str(parent)] += size

    def has(self, path: str) -> bool:
        """Whether the file or folder at an absolute path is in it."""
        return _is_below(path, self.folder) and os.path.relpath(path, self.folder) in self._sizes

    def check(self) -> Iterator[str]:
        """Faults: too large, or with packages that would hide ours."""
        if self.num_bytes >= MAX_UPLOAD_BYTES:
            shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in self._find_largest())
            yield (
                f"--working-dir {self.folder}: has {format_bytes(self.num_bytes)} to upload, and the Jobs API takes "
                f"{format_bytes(MAX_UPLOAD_BYTES)}; the largest are {shown}; list what can stay in .rayignore, or name "
                f"a smaller folder"
            )
        for package in PACKAGES:
            theirs, ours = Path(self.folder, package), Path(__file__).parents[1] / package
            is_ours = (theirs / "py.typed").exists() or ((theirs / "__main__.py").exists() and package == "jobs")
            if theirs.is_dir() and self.has(str(theirs)) and not (is_ours or theirs.samefile(ours)):
                yield f"--working-dir {self.folder}: its folder {package!r} would hide nightshift's own; rename it"

    def _find_largest(self) -> list[tuple[str, int]]:
        """The files and folders that weigh most, each as far down as it is about one thing."""
        return [
            (self._descend(name), self._sizes[name])
            for name in sorted(self._list_children("."), key=lambda name: -self._sizes[name])[:_SHOWN_ENTRIES]
        ]

    def _descend(self, name: str) -> str:
        children = self._list_children(name)
        heaviest = max(children, key=lambda child: self._sizes[child], default=None)
        if heaviest is not None and self._sizes[heaviest] > _DOMINANT * self._sizes[name]:
            return self._descend(heaviest)
        return f"{name}/" if children else name

    def _list_children(self, name: str) -> list[str]:
        return [path for path in self._sizes if path != name and str(Path(path).parent) == name]


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Each file that Ray would upload, relative to `folder`, and its bytes.

    Ray matches a path against every ignore file above it, and never enters a folder that matches.
    """
    from ray._private.thirdparty import pathspec  # the rules as Ray itself reads them

    parse: Callable[[str, Sequence[str]], Any] = pathspec.PathSpec.from_lines  # type: ignore[attr-defined]

    reads_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    names = _IGNORE_FILES if reads_gitignore else _IGNORE_FILES[1:]
    left_out = (folder, parse("gitwildmatch", _LEFT_OUT))

    def visit(path: Path, rules: list[tuple[Path, Any]]) -> Iterator[tuple[str, int]]:
        found = [path / name for name in names if (path / name).is_file()]
        rules = rules + [(path, parse("gitwildmatch", file.read_text().splitlines())) for file in found]
        if any(spec.match_file(str(path.relative_to(base))) for base, spec in rules):
            return
        if path.is_dir():
            for child in path.iterdir():
                yield from visit(child, rules)
        elif path.is_file():
            yield str(path.relative_to(folder)), path.stat().st_size

    return visit(folder, [left_out])


# ---------------------------------------------------------------------------------------------------------------
# The command


def compose_entrypoint(command: str, arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The line that the cluster's shell runs, and the variables that stand in it for arguments with secrets.

    (The line is listed and logged in many places, the values of variables in few.)
    """
    env: dict[str, str] = {}
    words = []
    for argument in arguments:
        if mask(argument) == argument:
            words.append(shlex.quote(argument))
        else:
            name = f"NIGHTSHIFT_SECRET_ARGUMENT_{len(env) + 1}"
            env[name] = argument
            words.append(f'"${name}"')
    return shlex.join(["python", "-m", f"jobs.{command}"]) + "".join(f" {word}" for word in words), env


def find_modules() -> list[str]:
    """The folders of our packages as they are here, in a checkout or where they were installed."""
    root = Path(__file__).parents[1]
    return [str(root / package) for package in PACKAGES]
