"""What the unit tests of `pipeline` share: an empty folder of a run, and retries that do not wait."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings

from pipeline.storage import LocalFolder

# The same examples every time, so that a test fails for the change that broke it; and no clock on a shared machine.
settings.register_profile("nightshift", deadline=None, derandomize=True, database=None)
settings.load_profile("nightshift")


@pytest.fixture
def folder(tmp_path) -> LocalFolder:
    """The folder of a run in which nothing has happened yet."""
    return LocalFolder(tmp_path / "out", scratch="_nightshift/tmp")


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long retries would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
