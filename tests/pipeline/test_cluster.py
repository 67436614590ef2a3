import socket

import pytest
import ray

from pipeline import cluster
from pipeline.cluster import open_cluster
from pipeline.errors import ClusterError


def test_address_where_nobody_answers_is_a_clear_error_and_no_endless_wait(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever the tests before this one have started
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: Connection refused") as raised:
        with open_cluster("127.0.0.1:1"):
            pass
    assert raised.value.exit_code == 4


def test_cluster_that_was_killed_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster._pass_over_dead(None) is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray/ray_current_cluster").write_text(address)
        assert cluster._pass_over_dead(None) is None
    assert cluster._pass_over_dead(None) == "local"
    assert cluster._pass_over_dead("10.0.0.1:6379") == "10.0.0.1:6379"
