"""cluster.yaml as far as it can be checked without a cloud: Ray's own schema, and the versions of the lock."""

import copy
import re
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


def test_cluster_yaml_is_valid_for_ray_up():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["head_node_type"] in config["available_node_types"]


def test_cluster_runs_the_ray_of_the_lock():
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    named = re.findall(r"ray\[default\]==([\d.]+)", (ROOT / "cluster.yaml").read_text())
    assert named == [locked[1]]
