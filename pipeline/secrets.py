"""What must not be read by everybody: found in texts and settings, and masked before they are written or shown.

Places that write call this: run.json and plans (what identifies a run), messages, logs, listings of jobs. Rows do not:
the `uri` of an image is data, as it was given. A masked place still tells one run from another, and stays the same
when a password is changed or an address is signed anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

MASK: Final = "***"

# Words in the name of a variable or of a query's parameter; `key` only at the end, or after one of the others.
_SECRET_WORDS: Final = frozenset(
    "token secret password passwd passphrase pwd credential credentials signature apikey sas".split()
)
_KEY_WORDS: Final = frozenset("access account api auth deploy encryption license private secret signing ssh".split())
# A name that ends so says where a secret is, or how it is used.
_HARMLESS_ENDS: Final = frozenset("dir expires file mode name path ttl url".split())
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Parameters that have other names, of addresses that Amazon, Google, Azure and CloudFront sign. They are masked
# whole, date and all, so that an address that is signed anew is the same place.
_SIGNING: Final = re.compile(
    r"x-(amz|goog)-.+|awsaccesskeyid|googleaccessid|sig|key-pair-id|policy|auth", re.IGNORECASE
)

# The user before a password stays, and so does one without a password, such as `anonymous`, except on the web, where
# tokens stand there. The secret keys of S3 have slashes in them.
_USER: Final = re.compile(
    r"\b(?P<scheme>https?|(?P<s3>s3[an]?)|[a-z][a-z0-9+.-]*)://"
    r"(?P<user>[^\s/?#@:'\"]*)(?::(?P<password>(?(s3)[^\s@'\"]+|[^\s/?#@'\"]*)))?@",
    re.IGNORECASE,
)
_PARAMETER: Final = re.compile(r"(?P<before>[?&;])(?P<name>[\w.-]+)=(?P<value>[^&;\s'\"#<>]+)")
_ASSIGNMENT: Final = re.compile(
    r"\b(?P<name>[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+)=(?P<value>[^\s'\"]+|'[^']*'|\"[^\"]*\")"
)
_BEARER: Final = re.compile(r"\b(Bearer|Basic) +[\w.~+/=-]{8,}", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether the value of a variable with this name is to be kept from sight: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _HARMLESS_ENDS:
        return False
    if _SECRET_WORDS & set(words) or words[-1] in ("key", "auth"):
        return True
    return any(before in _KEY_WORDS and after == "key" for before, after in pairwise(words))


def mask(text: str) -> str:
    """`text` without passwords in URIs, signatures of addresses, tokens, and values of variables that look secret."""
    if "://" in text:
        text = _USER.sub(_mask_user, text)
    if "=" in text:
        text = _PARAMETER.sub(_mask_parameter, text)
        text = _ASSIGNMENT.sub(_mask_assignment, text)
    return _BEARER.sub(rf"\1 {MASK}", text)


def mask_settings(settings: Any) -> Any:
    """Settings as they go into JSON, with every text in them masked, and every value that has a secret name."""
    if isinstance(settings, str):
        return mask(settings)
    if isinstance(settings, Mapping):
        return {
            name: MASK if isinstance(value, str) and is_secret_name(str(name)) else mask_settings(value)
            for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return type(settings)(mask_settings(value) for value in settings)
    return settings


def _mask_user(match: re.Match[str]) -> str:
    scheme, user, password = match["scheme"], match["user"], match["password"]
    if password is not None:
        return f"{scheme}://{user}:{MASK}@"
    return f"{scheme}://{MASK}@" if scheme.lower().startswith("http") else match[0]


def _mask_parameter(match: re.Match[str]) -> str:
    name = match["name"]
    is_secret = _SIGNING.fullmatch(name) or is_secret_name(name)
    return f"{match['before']}{name}={MASK}" if is_secret else match[0]


def _mask_assignment(match: re.Match[str]) -> str:
    return f"{match['name']}={MASK}" if is_secret_name(match["name"]) else match[0]
