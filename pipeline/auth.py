"""Tokens of Ray clusters: whether a cluster asks for one, which one is configured here, and whether it is right.

    address ─ ask, without a token ─ wanted? ─ find the token ─ ask, with it ─ accepted?

Ray sends a token to an address that it is given only in its token mode, and in that mode breaks against a cluster
without tokens. So the cluster is asked first: the dashboard over HTTP, the GCS and Ray Client over gRPC. Nothing here
imports Ray.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import urllib3

from pipeline.errors import ClusterError
from pipeline.secrets import mask

MODE_VARIABLE: Final = "RAY_AUTH_MODE"
PROBE_TIMEOUT_S: Final = 10.0
# Of the dashboard; the first needs no token, and says the mode. (Ray before 2.50 has neither it nor tokens.)
_MODE_PATH: Final = "/api/authentication_mode"
_VERSION_PATH: Final = "/api/version"
# Requests without content that have no effect.
_GCS_METHOD: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CLIENT_METHOD: Final = "/ray.rpc.RayletDriver/ClusterInfo"

Answer = Literal["accepted", "no token", "wrong token", "unreachable"]
"""What a cluster says to a request with the token at hand, or without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A configured token."""

    value: str = field(repr=False)
    source: str
    """The variable or file that it is from."""

    @property
    def headers(self) -> dict[str, str]:
        """What a request over HTTP or gRPC carries."""
        return {"authorization": f"Bearer {self.value}"}


def find_token() -> Token | None:
    """The token that Ray would send, from where Ray looks for it; raises ClusterError where it cannot be read."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value=value, source="RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        value = path.read_text().strip()
    except FileNotFoundError:
        if named:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH: there is no file {named!r}") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read the token in {str(path)!r}: {error}") from error
    return Token(value=value, source=str(path)) if value else None


def check_access(address: str) -> Token | None:
    """The token to send to the cluster at `address`, or None where it asks for none.

    `address` is that of a dashboard (`http://host:8265`), of a GCS (`host:6379`) or of Ray Client (`ray://host:10001`).
    Raises ClusterError, with the remedy, where nobody answers, or a token is missing or wrong.
    """
    answer = _ask(address, None)
    if answer == "accepted":
        return None
    token = find_token() if answer != "unreachable" else None
    if token is not None:
        answer = _ask(address, token)
    if answer == "unreachable":
        raise ClusterError(f"no Ray cluster answers at {mask(address)}")
    if token is None:
        raise ClusterError(
            f"the cluster at {mask(address)} asks for a token, and none is configured here: put the cluster's into "
            f"~/.ray/auth_token, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    if answer != "accepted":
        raise ClusterError(
            f"the cluster at {mask(address)} refuses the token from {token.source}: it has another one, which "
            f"`ray get-auth-token` prints on its head node"
        )
    return token


def enable_tokens(address: str | None) -> None:
    """Set Ray's token mode for this process if the cluster at `address`, or the one that Ray would find, asks for it.

    A mode that the environment sets stays as it is. Raises ClusterError where a token is missing or wrong; whether
    anybody is there at all is not for this to say.
    """
    if MODE_VARIABLE in os.environ:
        return
    given = address or os.environ.get("RAY_ADDRESS") or "auto"
    found = find_local_address() if given == "auto" else given
    if not found or found == "local" or _ask(found, None) in ("accepted", "unreachable"):
        return
    check_access(found)
    os.environ[MODE_VARIABLE] = "token"
    if "ray" in sys.modules:  # it has read the mode when it was imported
        from ray import _raylet

        _raylet.Config.initialize("")  # type: ignore[attr-defined]


def find_local_address() -> str | None:
    """The GCS of the cluster that was last started on this machine, as `ray start` leaves it for others."""
    with contextlib.suppress(OSError):
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    return None


def _ask(address: str, token: Token | None) -> Answer:
    if address.startswith(("http://", "https://")):
        return _ask_dashboard(address, token)
    is_client = address.startswith("ray://")
    return _ask_server(address.removeprefix("ray://"), _CLIENT_METHOD if is_client else _GCS_METHOD, token)


def _ask_dashboard(url: str, token: Token | None) -> Answer:
    headers = token.headers if token else {}
    try:
        with urllib3.PoolManager(retries=False, timeout=PROBE_TIMEOUT_S) as pool:
            if token is None:
                mode = pool.request("GET", url.rstrip("/") + _MODE_PATH, headers=headers)
                if mode.status == 200 and mode.json().get("authentication_mode") == "token":
                    return "no token"
            status = pool.request("GET", url.rstrip("/") + _VERSION_PATH, headers=headers).status
    except (urllib3.exceptions.HTTPError, ValueError, OSError):
        return "unreachable"
    match status:
        case 401:
            return "no token"
        case 403:
            return "wrong token" if token else "no token"
        case 200:
            return "accepted"
    return "unreachable"


def _ask_server(address: str, method: str, token: Token | None) -> Answer:
    """Ask over gRPC; whatever is answered but a refusal, the cluster has looked at more than the token."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=PROBE_TIMEOUT_S, metadata=list(token.headers.items()) if token else None)
        except grpc.RpcError as error:
            match error.code():
                case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                    return "wrong token" if token else "no token"
                case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                    return "unreachable"
    return "accepted"
