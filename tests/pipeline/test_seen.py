"""A set of URIs on disk says of each whether it is new, and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.seen import SeenUris


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=5)))
def test_uri_is_new_the_first_time_only(uris):
    with SeenUris() as seen:
        assert [seen.add(uri) for uri in uris] == [uri not in uris[:number] for number, uri in enumerate(uris)]


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with SeenUris() as seen:
        seen.add("a")
        assert os.listdir(tmp_path) != []
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_on_disk_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), SeenUris():
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_two_sets_know_nothing_of_each_other():
    with SeenUris() as one, SeenUris() as other:
        assert one.add("a")
        assert other.add("a")


def test_one_thread_may_continue_what_another_began():
    with SeenUris() as seen:
        thread = threading.Thread(target=seen.add, args=("a",))
        thread.start()
        thread.join()
        assert not seen.add("a")


def test_memory_does_not_grow_with_the_number_of_uris():
    with SeenUris() as seen:
        tracemalloc.start()
        try:
            assert all(seen.add(f"/photos/{number:0100d}.jpg") for number in range(50_000))
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()
