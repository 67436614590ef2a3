import pytest
import ray

from pipeline.cluster import open_cluster
from pipeline.errors import ClusterError


def test_address_where_nobody_answers_is_a_clear_error_and_no_endless_wait(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever the tests before this one have started
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: Connection refused") as raised:
        with open_cluster("127.0.0.1:1"):
            pass
    assert raised.value.exit_code == 4
