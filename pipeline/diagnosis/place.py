"""Whether the places of a run can be used: that inputs can be read, and that files appear in an output as they must."""

from __future__ import annotations

import configparser
import contextlib
import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.diagnosis.child import Report, ask
from pipeline.diagnosis.finding import Finding
from pipeline.storage import has_scheme, normalise, uri_to_path
from pipeline.terminal import format_bytes

# The libraries of stores wait 10 s for a connection, and what they say then is worth more than that we waited.
SILENCE_S: Final = 20.0
# Labels of some ten million images.
_MIN_FREE_BYTES: Final = 1_000_000_000
# File systems over buckets, in which a rename is a copy: a file appears while it is written, or is seen late.
_OVER_BUCKETS: Final = ("s3fs", "gcsfuse", "goofys", "rclone", "mountpoint-s3", "blobfuse", "juicefs")
_OF_THE_NETWORK: Final = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "sshfs", "afs")
_FLEETING: Final = {"tmpfs": "the machine's memory", "ramfs": "the machine's memory", "overlay": "the container"}

_REMEDIES: Final = {
    errno.EACCES: "give yourself the right to write there, or name another folder",
    errno.EPERM: "give yourself the right to write there, or name another folder",
    errno.EROFS: "mount it for writing, or name another folder",
    errno.ENOSPC: "free some space or inodes, or name another folder",
    errno.EDQUOT: "your quota is used up: delete something, or have it raised",
    errno.ENOTDIR: "name a folder: a part of this path is a file",
}
_ANSWERS: Final = {
    "AccessDenied": "the credentials are known but lack rights: they need s3:ListBucket, and s3:GetObject, "
    "s3:PutObject and s3:DeleteObject below this key (for an input, the first two)",
    "NoSuchBucket": "correct the bucket's name, or create it",
    "InvalidAccessKeyId": "these credentials belong to another store, or are no longer valid: look at AWS_PROFILE, "
    "AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "set this machine's clock: the store's differs by more than 15 minutes",
    "NetworkConnection": "see to AWS_ENDPOINT_URL, DNS, proxy and firewall: nobody answers there",
    "MissingLibrary": "pip install what the message names",
}
_SAME_ANSWERS: Final = {
    "HTTP403": "AccessDenied",
    "PermissionError": "AccessDenied",
    "HTTP401": "InvalidAccessKeyId",
    "InvalidClientTokenId": "InvalidAccessKeyId",
    "UnrecognizedClient": "InvalidAccessKeyId",
    "HTTP404": "NoSuchBucket",
    "FileNotFoundError": "NoSuchBucket",
    "RequestExpired": "RequestTimeTooSkewed",
}
_AWS_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_AWS_ROLES: Final = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def look_at_place(given: str, *, is_output: bool) -> list[Finding]:
    """Use a place as a run would, in a child process, and judge."""
    uri = normalise(given)
    report = ask("place", {"uri": uri, "is_output": is_output}, silence_s=SILENCE_S)
    return [check_place(given, report, is_output=is_output, is_bucket=has_scheme(uri))]


def find_folder(given: str) -> str | None:
    """The folder of an output on this machine, or the nearest above it that exists; None for a bucket."""
    uri = normalise(given)
    if has_scheme(uri):
        return None
    path = Path(uri_to_path(uri))
    with contextlib.suppress(OSError):
        return str(next(folder for folder in (path, *path.parents) if folder.exists()))
    return None


def check_place(given: str, report: Report, *, is_output: bool, is_bucket: bool) -> Finding:
    name = "output" if is_output else "input"
    facts = report.facts
    if refusal := facts.get("refusal"):
        return _describe_refusal(name, given, refusal, report, is_bucket=is_bucket)
    if report.trouble is not None:
        remedy = "see to AWS_ENDPOINT_URL, DNS, proxy and firewall" if is_bucket else "see to the disk or its server"
        found = f"{given}: {report.trouble}"
        return Finding(name=name, state="fault", found=found, remedy=remedy, details=report.details)
    seconds = f"in {facts['seconds']:.1f} s"
    if not is_output:
        if facts["kind"] is None:
            return Finding(name=name, state="fault", found=f"{given}: nothing is there", remedy="correct the name")
        done = "read" if facts["kind"] == "file" else "listed"
        return Finding(name=name, state="ok", found=f"{given}: a {facts['kind']}, {done} {seconds}")
    if is_bucket:
        return Finding(name=name, state="ok", found=f"{given}: listed, written, read and deleted {seconds}")
    return _check_folder(given, facts, seconds)


def _describe_refusal(name: str, given: str, refusal: Mapping[str, Any], report: Report, *, is_bucket: bool) -> Finding:
    kind = refusal["kind"]
    if is_bucket:
        remedy = _ANSWERS.get(_SAME_ANSWERS.get(kind, kind), "see to the address, the credentials and the store itself")
    else:
        remedy = _REMEDIES.get(refusal["errno"], "see to the disk or its server, or name another folder")
    found = f"{given}: refused while {report.step}: {refusal['message']}"
    return Finding(name=name, state="fault", found=found, remedy=remedy, details=report.details)


def _check_folder(given: str, facts: Mapping[str, Any], seconds: str) -> Finding:
    kind = facts["file_system"] or "unknown"
    if not facts["is_folder"]:
        found = f"{given}: {facts['existing']} is a file"
        return Finding(name="output", state="fault", found=found, remedy="name a folder")
    there = f"{given}: {kind}, {format_bytes(facts['free'])} free"
    if any(word in kind for word in _OVER_BUCKETS):
        found = f"{there}; a bucket behind a file system, in which a file does not appear at once and whole"
        return Finding(
            name="output", state="warning", found=found, remedy="give the bucket itself, as s3://… or gs://…"
        )
    if not facts["is_exclusive"] or facts["lock"] != "yes":
        lacks = "two processes can create the same file" if not facts["is_exclusive"] else f"locks: {facts['lock']}"
        where = " (of the network)" if any(word in kind for word in _OF_THE_NETWORK) else ""
        return Finding(
            name="output",
            state="warning",
            found=f"{there}{where}; {lacks}",
            remedy="mount it with locks (NFS: version 4, or without `nolock`), or never start two runs on one output",
        )
    if facts["free"] < _MIN_FREE_BYTES or not facts["has_inodes"]:
        found = there if facts["has_inodes"] else f"{there}, and hardly an inode"
        return Finding(name="output", state="warning", found=found, remedy=_REMEDIES[errno.ENOSPC])
    if kind in _FLEETING:
        found = f"{there}; it ends with {_FLEETING[kind]}"
        return Finding(
            name="output", state="warning", found=found, remedy="name a folder that stays, or mount one there"
        )
    return Finding(name="output", state="ok", found=f"{there}; written, renamed, locked and removed {seconds}")


# ---------------------------------------------------------------------------------------------------------------
# Credentials


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What an S3 client of this process would find, without any secret."""

    given: tuple[str, ...]
    """Those of the variables that are set."""
    profile: str | None
    """AWS_PROFILE."""
    profiles: frozenset[str]
    """With keys, a role or a login, by AWS's files."""
    endpoint: str | None
    region: str | None
    has_metadata: bool
    """Whether a machine in Amazon's cloud may be asked for those of its role."""


def read_credentials(variables: Mapping[str, str]) -> Credentials:
    home = Path.home() / ".aws"
    profiles = set()
    for path in (
        variables.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials",
        variables.get("AWS_CONFIG_FILE") or home / "config",
    ):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(configparser.Error, UnicodeDecodeError):
            parser.read(path)
        for section in parser.sections():
            names = set(parser[section])
            if names & {"aws_access_key_id", "role_arn", "sso_session", "sso_start_url", "credential_process"}:
                profiles.add(section.removeprefix("profile "))
    return Credentials(
        given=tuple(name for name in (*_AWS_KEYS, *_AWS_ROLES) if variables.get(name)),
        profile=variables.get("AWS_PROFILE"),
        profiles=frozenset(profiles),
        endpoint=variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL"),
        region=variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION"),
        has_metadata=variables.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and _is_at_amazon(),
    )


def _is_at_amazon() -> bool:
    with contextlib.suppress(OSError):
        return "amazon" in Path("/sys/class/dmi/id/sys_vendor").read_text().lower()
    return False


def check_credentials(credentials: Credentials) -> Finding:
    """Whether S3 has what it needs; whether that is any good, only a place that is given can tell."""
    name = "s3"
    given, profile = credentials.given, credentials.profile
    where = f"; endpoint {credentials.endpoint}" if credentials.endpoint else ""
    where += f"; region {credentials.region}" if credentials.region else ""
    if half := [key for key in _AWS_KEYS if key in given]:
        if len(half) == 1:
            other = next(key for key in _AWS_KEYS if key not in given)
            found = f"{half[0]} is set, and {other} is not"
            return Finding(name=name, state="fault", found=found, remedy=f"set {other}, or unset {half[0]}")
        return Finding(name=name, state="ok", found=f"keys in the environment{where}")
    if roles := [variable for variable in given if variable in _AWS_ROLES]:
        return Finding(name=name, state="ok", found=f"a role, by {roles[0]}{where}")
    if profile is not None and profile not in credentials.profiles:
        known = ", ".join(sorted(credentials.profiles)) or "none"
        return Finding(
            name=name,
            state="fault",
            found=f"AWS_PROFILE is {profile!r}, which AWS's files do not have; known: {known}",
            remedy=f"`aws configure --profile {profile}`, or name a profile that is there",
        )
    if (used := profile or "default") in credentials.profiles:
        return Finding(name=name, state="ok", found=f"profile {used!r}{where}")
    if credentials.has_metadata:
        return Finding(name=name, state="ok", found=f"those of this machine's role, if it has one{where}")
    return Finding(name=name, state="skipped", found=f"no credentials here, which only s3:// would need{where}")
