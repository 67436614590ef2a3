import pytest
import ray

from pipeline.cluster import Cluster, find_scaling, find_training_scaling, open_cluster
from pipeline.errors import ClusterError, ConfigError


def describe(*, cpus=8.0, gpus=0.0, nodes=1) -> Cluster:
    return Cluster(
        num_nodes=nodes,
        num_cpus=cpus * nodes,
        num_gpus=gpus * nodes,
        cpus_per_node=cpus,
        gpus_per_node=gpus,
        is_here=False,
        ray_version="2.60.0",
    )


def scale(cluster, **wishes):
    auto = {"num_workers": "auto", "gpus_per_worker": None, "cpus_per_worker": None}
    return find_scaling(cluster, **{**auto, "is_split": False, **wishes})


@pytest.mark.parametrize(
    ("cluster", "wishes", "expected"),
    [
        # min and max workers, CPUs and GPUs of each, decoders
        (describe(cpus=2), {}, (2, 2, 1, 0, 0)),
        (describe(cpus=2), {"num_workers": "1"}, (1, 1, 1, 0, 0)),
        (describe(cpus=2), {"num_workers": "4"}, (4, 4, 0.5, 0, 0)),
        (describe(cpus=64), {}, (16, 16, 4, 0, 0)),
        (describe(cpus=8, nodes=4), {}, (32, 32, 1, 0, 0)),
        (describe(cpus=8), {"cpus_per_worker": 3.0}, (2, 2, 3, 0, 0)),
        (describe(cpus=16, gpus=2, nodes=3), {}, (6, 6, 8, 1, 0)),
        (describe(cpus=16, gpus=2), {"gpus_per_worker": 0.5}, (4, 4, 4, 0.5, 0)),
        (describe(cpus=16, gpus=2), {"gpus_per_worker": 0.0}, (16, 16, 1, 0, 0)),
        (describe(cpus=16, gpus=2), {"num_workers": "1..8"}, (1, 8, 8, 1, 0)),
        (describe(cpus=2), {"is_split": True}, (1, 1, 1, 0, 1)),
        (describe(cpus=1), {"is_split": True}, (1, 1, 0.5, 0, 1)),
        (describe(cpus=16, gpus=2), {"is_split": True}, (2, 2, 1, 1, 14)),
    ],
)
def test_workers_fill_the_cluster_and_no_more(cluster, wishes, expected):
    scaling = scale(cluster, **wishes)
    assert (scaling.min_workers, scaling.max_workers) == expected[:2]
    assert (scaling.cpus_per_worker, scaling.gpus_per_worker, scaling.num_decoders) == expected[2:]


def test_no_more_workers_are_started_than_there_are_shards():
    scaling = scale(describe(cpus=16, gpus=2), num_workers="4..8", is_split=True).limited_to(3)
    assert (scaling.min_workers, scaling.max_workers, scaling.num_decoders) == (3, 3, 3)


def test_worker_that_no_node_can_hold_is_refused_for_every_reason_at_once():
    with pytest.raises(ConfigError) as raised:
        scale(describe(cpus=4, gpus=1), cpus_per_worker=8.0, gpus_per_worker=2.0)
    assert len(raised.value.faults) == 2


def scale_training(cluster, *, num_workers="auto", cpus_per_worker=None):
    scaling = find_training_scaling(cluster, num_workers=num_workers, cpus_per_worker=cpus_per_worker)
    assert scaling.num_decoders == 0
    return scaling.min_workers, scaling.max_workers, scaling.cpus_per_worker, scaling.gpus_per_worker


@pytest.mark.parametrize(
    ("cluster", "wishes", "expected"),
    [
        # min and max workers, CPUs and GPUs of each
        (describe(cpus=2), {}, (1, 1, 2, 0)),
        (describe(cpus=64, nodes=3), {}, (3, 3, 64, 0)),
        (describe(cpus=2), {"num_workers": "2"}, (2, 2, 1, 0)),
        (describe(cpus=2), {"num_workers": "4"}, (4, 4, 0.5, 0)),
        (describe(cpus=8, nodes=2), {"num_workers": "1"}, (1, 1, 8, 0)),
        (describe(cpus=8, nodes=2), {"num_workers": "1..4"}, (1, 4, 4, 0)),
        (describe(cpus=8), {"num_workers": "3"}, (3, 3, 2, 0)),
        (describe(cpus=8), {"cpus_per_worker": 3.0}, (1, 1, 3, 0)),
        (describe(cpus=16, gpus=2, nodes=3), {}, (6, 6, 8, 1)),
        (describe(cpus=2, gpus=4), {"cpus_per_worker": 0.5}, (4, 4, 0.5, 1)),
        (describe(cpus=16, gpus=2), {"num_workers": "1"}, (1, 1, 8, 1)),
        # a cluster that can grow: the first of them are there
        (describe(cpus=16, gpus=2), {"num_workers": "1..8"}, (1, 8, 8, 1)),
        (describe(cpus=16, gpus=2), {"num_workers": "2", "cpus_per_worker": 4.0}, (2, 2, 4, 1)),
    ],
)
def test_training_has_a_worker_for_each_gpu_or_else_for_each_node(cluster, wishes, expected):
    assert scale_training(cluster, **wishes) == expected


@pytest.mark.parametrize(
    ("cluster", "wishes", "message"),
    [
        (describe(cpus=16, gpus=2), {"num_workers": "3"}, "3 workers with 1 GPU each need 3, and the cluster has 2"),
        (describe(cpus=4), {"num_workers": "3", "cpus_per_worker": 2.0}, "with 2 CPU each need 6, and the cluster has"),
        (describe(cpus=4, nodes=3), {"cpus_per_worker": 8.0}, "no node of the cluster has more than 4 CPUs"),
    ],
)
def test_training_whose_workers_can_never_be_there_at_once_is_refused(cluster, wishes, message):
    with pytest.raises(ConfigError, match=message):
        scale_training(cluster, **wishes)


def test_address_where_nobody_answers_is_a_clear_error_and_no_endless_wait(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever the tests before this one have started
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: Connection refused") as raised:
        with open_cluster("127.0.0.1:1"):
            pass
    assert raised.value.exit_code == 4
