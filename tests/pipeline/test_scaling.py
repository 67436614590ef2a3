import pytest

from pipeline.errors import ConfigError
from pipeline.scaling import UNLIMITED, Cluster, count_nodes, find_scaling, find_training_scaling


def describe(*, cpus=8.0, gpus=0.0, nodes=1, **changes) -> Cluster:
    """A Ray that a process has started for itself, of nodes that are alike."""
    return describe_nodes(*[(cpus, gpus)] * nodes, **changes)


def describe_nodes(*nodes, groups=(), is_open=False, has_launcher=False) -> Cluster:
    """A cluster of nodes with so many CPUs and GPUs, and what an autoscaler may add."""
    return Cluster(
        kinds=count_nodes(
            ({"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes),
            (({"CPU": cpus, "GPU": gpus}, most) for cpus, gpus, most in groups),
        ),
        is_here=False,
        is_open=is_open,
        has_launcher=has_launcher,
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
        (describe(cpus=2), {"num_workers": "3"}, (3, 3, 0.6666, 0, 0)),
        (describe(cpus=2, nodes=2), {"num_workers": "5"}, (5, 5, 0.6666, 0, 0)),
        (describe(cpus=64), {}, (16, 16, 4, 0, 0)),
        (describe(cpus=8, nodes=4), {}, (32, 32, 1, 0, 0)),
        (describe(cpus=8), {"cpus_per_worker": 3.0}, (2, 2, 3, 0, 0)),
        (describe(cpus=3, nodes=2), {"cpus_per_worker": 2.0}, (2, 2, 2, 0, 0)),
        (describe(cpus=16, gpus=2, nodes=3), {}, (6, 6, 8, 1, 0)),
        (describe(cpus=16, gpus=2), {"gpus_per_worker": 0.5}, (4, 4, 4, 0.5, 0)),
        (describe(cpus=16, gpus=2), {"gpus_per_worker": 0.4}, (4, 4, 4, 0.4, 0)),
        (describe(cpus=16, gpus=2), {"gpus_per_worker": 0.0}, (16, 16, 1, 0, 0)),
        (describe(cpus=16, gpus=2), {"num_workers": "1..8"}, (1, 8, 8, 1, 0)),
        (describe(cpus=2, gpus=4), {}, (4, 4, 0.5, 1, 0)),
        # the cores of a worker are those that every node with GPUs has for it; a head without any counts for nothing
        (describe_nodes((0, 0), (16, 1), (8, 1), (32, 0)), {}, (2, 2, 8, 1, 0)),
        (describe(cpus=2), {"is_split": True}, (1, 1, 1, 0, 1)),
        (describe(cpus=1), {"is_split": True}, (1, 1, 0.5, 0, 1)),
        (describe(cpus=4), {"is_split": True, "num_workers": "3"}, (3, 3, 1, 0, 1)),
        (describe(cpus=16, gpus=2), {"is_split": True}, (2, 2, 1, 1, 14)),
        (describe_nodes((16, 0), (8, 1), (8, 1)), {"is_split": True}, (2, 2, 1, 1, 16)),
    ],
)
def test_workers_fill_the_cluster_and_no_more(cluster, wishes, expected):
    scaling = scale(cluster, **wishes)
    assert (scaling.min_workers, scaling.max_workers) == expected[:2]
    assert (scaling.cpus_per_worker, scaling.gpus_per_worker, scaling.num_decoders) == expected[2:]


@pytest.mark.parametrize(
    ("cluster", "wishes", "expected"),
    [
        # min, first and max workers, GPUs of each
        (describe(cpus=2, is_open=True), {}, (2, 2, UNLIMITED, 0)),
        (describe(cpus=2, is_open=True), {"num_workers": "3"}, (3, 3, 3, 0)),
        (describe(cpus=2, is_open=True), {"num_workers": "1..9"}, (1, 2, 9, 0)),
        (describe(cpus=2, gpus=1, is_open=True), {"num_workers": "1..9"}, (1, 1, 9, 1)),
        # an autoscaler that can add GPUs: never CPUs instead
        (describe_nodes((0, 0), groups=[(0, 0, 1), (16, 1, 8)]), {}, (1, 1, 8, 1)),
        (describe_nodes((4, 0), (16, 1), groups=[(4, 0, 1), (16, 1, 8)]), {}, (1, 1, 8, 1)),
        (describe_nodes((16, 1), groups=[(16, 1, -1)]), {}, (1, 1, UNLIMITED, 1)),
        (describe_nodes((16, 1), groups=[(16, 1, 8)]), {"num_workers": "8"}, (8, 8, 8, 1)),
        (describe_nodes((16, 1), groups=[(16, 1, 8)]), {"num_workers": "2..8"}, (2, 2, 8, 1)),
        # one that does not tell what it can add
        (describe(cpus=4, has_launcher=True), {"gpus_per_worker": 1.0, "num_workers": "6"}, (6, 6, 6, 1)),
        (describe(cpus=4, has_launcher=True), {}, (4, 4, UNLIMITED, 0)),
    ],
)
def test_workers_begin_where_there_is_room_and_come_to_what_the_cluster_can_grow_to(cluster, wishes, expected):
    scaling = scale(cluster, **wishes)
    assert (scaling.min_workers, scaling.num_workers, scaling.max_workers, scaling.gpus_per_worker) == expected


def test_decoders_grow_with_the_nodes_without_gpus():
    scaling = scale(describe_nodes((4, 0), (8, 1), groups=[(4, 0, 3), (8, 1, 5)]), is_split=True)
    assert (scaling.num_decoders, scaling.max_decoders) == (4, 12)
    assert (scaling.num_workers, scaling.max_workers) == (1, 5)


@pytest.mark.parametrize("cpus", [1, 2, 3, 7])
def test_shares_of_cores_fit_together_in_the_arithmetic_of_ray(cpus):
    for num_workers in range(1, 40):
        grains = 10_000 * scale(describe(cpus=cpus), num_workers=str(num_workers)).cpus_per_worker
        assert grains == pytest.approx(round(grains), abs=1e-9)
        assert round(grains) * num_workers <= cpus * 10_000


def test_no_more_workers_are_started_than_there_are_shards():
    scaling = scale(describe(cpus=16, gpus=2, is_open=True), is_split=True).limited_to(3)
    assert (scaling.min_workers, scaling.num_workers, scaling.max_workers) == (2, 2, 3)
    assert (scaling.num_decoders, scaling.max_decoders) == (3, 3)


def test_worker_that_no_node_can_hold_is_refused_for_every_reason_at_once():
    with pytest.raises(ConfigError) as raised:
        scale(describe(cpus=4, gpus=1), cpus_per_worker=8.0, gpus_per_worker=2.0)
    assert len(raised.value.faults) == 2


@pytest.mark.parametrize(
    ("cluster", "wishes", "message"),
    [
        (
            describe(cpus=8, gpus=4, is_open=True),
            {"num_workers": "5"},
            "^--num-workers 5: the cluster has room for 4 with 1 GPU and 2 CPU each; --num-workers 1..5 begins with",
        ),
        (describe(cpus=8, gpus=2), {"num_workers": "5", "gpus_per_worker": 0.5}, "room for 4 with 0.5 GPU and 2 CPU"),
        (describe(cpus=2, nodes=2), {"num_workers": "3", "cpus_per_worker": 1.5}, "room for 2 with 1.5 CPU each"),
        (describe(cpus=2), {"num_workers": "500"}, "room for 200 with 0.01 CPU each"),
        (describe_nodes((8, 1), groups=[(8, 1, 3)]), {"num_workers": "4"}, "room for 3 with 1 GPU"),
        (describe_nodes((0, 0)), {}, "no node of the cluster has more than 0 CPUs"),
    ],
)
def test_workers_that_can_never_be_there_are_refused_instead_of_waited_for(cluster, wishes, message):
    with pytest.raises(ConfigError, match=message):
        scale(cluster, **wishes)


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
        (describe(cpus=16, gpus=2), {"num_workers": "3"}, "room for 2 with 1 GPU and 8 CPU each"),
        (describe(cpus=4), {"num_workers": "3", "cpus_per_worker": 2.0}, "room for 2 with 2 CPU each"),
        (describe(cpus=4, nodes=3), {"cpus_per_worker": 8.0}, "no node of the cluster has more than 4 CPUs"),
    ],
)
def test_training_whose_workers_can_never_be_there_at_once_is_refused(cluster, wishes, message):
    with pytest.raises(ConfigError, match=message):
        scale_training(cluster, **wishes)
