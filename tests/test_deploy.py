"""The files that make a cluster, as far as they can be checked without one.

Ray's own schema and command line, bash's syntax, a simulated AWS, and the parsers of nightshift itself; and that all
files agree with the lock and with each other about versions, the token, and what listens where.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cli import parse
from jobs.label import LabelConfig

ROOT = Path(__file__).parents[1]
CLOUDS = ("cluster.yaml", "deploy/gcp.yaml")
CLUSTERS = (*CLOUDS, "deploy/on-premises.yaml")
FILES = (*CLUSTERS, "deploy/rayjob.yaml", "deploy/aws-roles.yaml", "deploy/Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_cluster(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def list_commands(config: dict[str, Any]) -> list[str]:
    return [command for key, commands in config.items() if key.endswith("_commands") for command in commands]


def list_ray_commands(config: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The `ray …` of a cluster file: each whole command line, and its arguments after `ray`."""
    found = []
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        for part in command.split(";"):
            words = shlex.split(part)
            if calls := [at for at, word in enumerate(words) if word == "ray" or word.endswith("/bin/ray")]:
                found.append((command, words[calls[0] + 1 :]))
    return found


def read_lock() -> dict[str, set[str]]:
    lock: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE):
        lock.setdefault(name, set()).add(version)
    return lock


# ---------------------------------------------------------------------------------------------------------------
# Clusters of `ray up`


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_file_is_valid_for_ray_up(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(read_cluster(name)))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_each_command_of_a_cluster_file_is_bash_and_each_ray_start_is_known_to_ray(name: str):
    from ray.scripts.scripts import cli

    config = read_cluster(name)
    for command in list_commands(config):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    calls = [arguments for _, arguments in list_ray_commands(config)]
    assert sorted(call[0] for call in calls) == ["start", "start", "stop", "stop"]
    for call in calls:
        cli.commands[call[0]].make_context(call[0], call[1:])  # only parses; raises for an unknown flag


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_is_sent_to_the_nodes_is_there_and_is_what_the_setup_reads(name: str):
    config = read_cluster(name)
    mounts = {remote: local for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    assert mounts and all((ROOT / local).is_file() for local in mounts.values())
    named = set(re.findall(r"~/nightshift/[\w.-]+\.(?:toml|lock)", "\n".join(config["setup_commands"])))
    assert named == set(mounts)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_token_reaches_every_node_and_nothing_starts_without_it(name: str):
    config = read_cluster(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    is_set_for_all = "--env RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
    for command, arguments in list_ray_commands(config):
        if arguments[0] == "start":
            assert is_set_for_all or "RAY_AUTH_MODE=token" in command


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_dashboard_stays_on_the_loopback_of_a_head_that_runs_no_workers(name: str):
    config = read_cluster(name)
    [head] = [arguments for _, arguments in list_ray_commands(config) if "--head" in arguments]
    assert "--dashboard-host=127.0.0.1" in head
    types = config.get("available_node_types", {"head": {"resources": {}}})
    assert types["head"]["resources"] == {"CPU": 0} or {"--num-cpus=0", "--num-gpus=0"} <= set(head)


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_workers_come_and_go_and_leave_nothing_behind(name: str):
    config = read_cluster(name)
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"])
    assert head["max_workers"] == 0  # no second head as a worker
    assert 1 <= config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False
    market = gpu["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
    assert market == "spot" or gpu["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


def test_google_nodes_have_the_resources_that_ray_cannot_find_out():
    # Ray asks AWS what a machine type has; of Google's, it knows what the file says.
    config = read_cluster("deploy/gcp.yaml")
    gpu = config["available_node_types"]["gpu"]
    assert gpu["node_config"]["machineType"] == f"g2-standard-{gpu['resources']['CPU']}"
    assert gpu["node_config"]["scheduling"]["automaticRestart"] is False  # Google refuses spot machines that have it
    assert gpu["node_config"]["serviceAccounts"][0]["email"].endswith("@PROJECT_ID.iam.gserviceaccount.com")
    assert config["provider"]["project_id"] == "PROJECT_ID"


# ---------------------------------------------------------------------------------------------------------------
# AWS


@pytest.fixture
def aws(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A function that makes a client of a simulated AWS, in which nothing is there but what a new account has."""
    import boto3
    import urllib3

    for key, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "HOME": str(tmp_path),  # Ray keeps the key of the cluster in ~/.ssh
    }.items():
        monkeypatch.setenv(key, value)
    (tmp_path / ".ssh").mkdir()
    yield lambda service: boto3.client(service, region_name="us-west-2")
    urllib3.request("POST", f"{s3_server}/moto-api/reset")


@pytest.mark.slow
def test_the_roles_are_a_valid_stack():
    from cfnlint.api import lint_all

    faults = lint_all((ROOT / "deploy/aws-roles.yaml").read_text())
    assert not [str(fault) for fault in faults if fault.rule.severity != "informational"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_starts_the_nodes_of_the_cluster_file_with_the_roles_of_the_stack(
    aws: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
):
    from botocore.client import BaseClient
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    buckets = [{"ParameterKey": "Inputs", "ParameterValue": "a,b"}, {"ParameterKey": "Outputs", "ParameterValue": "c"}]
    aws("cloudformation").create_stack(
        StackName="nightshift",
        TemplateBody=(ROOT / "deploy/aws-roles.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=buckets,
    )
    config = _bootstrap_config(copy.deepcopy(read_cluster("cluster.yaml")), no_config_cache=True)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"].items() >= {"CPU": 16, "GPU": 1}.items()

    calls: set[str] = set()
    call = BaseClient._make_api_call

    def record(self: Any, operation: str, arguments: Any) -> Any:
        calls.add(f"{self.meta.service_model.service_name}:{operation}")
        return call(self, operation, arguments)

    # As the autoscaler on the head does. botocore and the simulation check each name and value of the node_configs.
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    with monkeypatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", record)
        for name, node_type in types.items():
            provider.create_node(dict(node_type["node_config"]), {"ray-user-node-type": name}, 1)
        nodes = {provider.node_tags(node)["ray-user-node-type"]: node for node in provider.non_terminated_nodes({})}
        assert sorted(nodes) == ["gpu", "head"]
        described = {name: aws("ec2").describe_instances(InstanceIds=[node]) for name, node in nodes.items()}
        provider.terminate_node(nodes["gpu"])

    instances = {name: answer["Reservations"][0]["Instances"][0] for name, answer in described.items()}

    assert instances["gpu"]["InstanceLifecycle"] == "spot" and "InstanceLifecycle" not in instances["head"]
    for name, role in (("head", "nightshift-head"), ("gpu", "nightshift-worker")):
        assert instances[name]["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{role}")
        assert instances[name]["MetadataOptions"]["HttpTokens"] == "required"
        assert instances[name]["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"]

    allowed = _list_actions(aws("iam"), "nightshift-head")
    refused = {operation for operation in calls if not any(fnmatchcase(operation, pattern) for pattern in allowed)}
    assert not refused
    assert all(action.startswith("s3:") for action in _list_actions(aws("iam"), "nightshift-worker"))


def _list_actions(iam: Any, role: str) -> set[str]:
    """What a role may do, whatever to."""
    inline = [  # which the simulation writes as Python would: as good as YAML
        yaml.safe_load(iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"])
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    ]
    attached = [
        iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId="v1")["PolicyVersion"]["Document"]
        for policy in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
    ]
    assert attached
    statements = [statement for document in inline + attached for statement in document["Statement"]]
    actions = [statement["Action"] for statement in statements]
    return {name for action in actions for name in ([action] if isinstance(action, str) else action)}


# ---------------------------------------------------------------------------------------------------------------
# Kubernetes


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT, FLAG, LIST = {"type": "string"}, {"type": "boolean"}, {"type": "array", "minItems": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
CAPABILITIES = _object("drop", drop={**LIST, "items": TEXT})
SECURITY = _object("", allowPrivilegeEscalation=FLAG, capabilities=CAPABILITIES)
CONTAINER = _object(
    "name image resources",
    name=TEXT,
    image=TEXT,
    securityContext=SECURITY,
    resources=_object("requests limits", requests=QUANTITIES, limits=QUANTITIES),
)
POD = _object(
    "containers",
    serviceAccountName=TEXT,
    securityContext=_object("", runAsNonRoot=FLAG, seccompProfile=_object("type", type={"const": "RuntimeDefault"})),
    tolerations={**LIST, "items": _object("key operator", key=TEXT, operator=TEXT, effect=TEXT)},
    containers={**LIST, "items": CONTAINER},
)
TEMPLATE = _object("spec", spec=POD)
# The fields that deploy/rayjob.yaml uses, with their types in KubeRay 1.7 and Kubernetes 1.37.
RAY_JOB = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object("name", name=TEXT),
    spec=_object(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=_object(
            "rayVersion authOptions headGroupSpec workerGroupSpecs",
            rayVersion=TEXT,
            authOptions=_object("mode", mode={"enum": ["token"]}),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=_object(
                "version", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, securityContext=SECURITY
            ),
            headGroupSpec=_object("rayStartParams template", rayStartParams=TEXTS, template=TEMPLATE),
            workerGroupSpecs={
                **LIST,
                "items": _object(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=TEMPLATE,
                ),
            },
        ),
    ),
)


@pytest.fixture
def ray_job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())


def test_the_ray_job_has_only_fields_that_kuberay_knows(ray_job: dict[str, Any]):
    jsonschema.validate(ray_job, RAY_JOB)


def test_the_ray_job_is_tried_again_and_leaves_no_cluster_behind(ray_job: dict[str, Any]):
    spec, cluster = ray_job["spec"], ray_job["spec"]["rayClusterSpec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert cluster["enableInTreeAutoscaling"] and cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [gpu] = cluster["workerGroupSpecs"]
    assert gpu["replicas"] == gpu["minReplicas"] == 0 < gpu["maxReplicas"]


def test_the_pods_of_the_ray_job_are_not_root(ray_job: dict[str, Any]):
    cluster = ray_job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert all(container["securityContext"]["allowPrivilegeEscalation"] is False for container in pod["containers"])


def test_the_ray_job_labels_with_a_command_that_exists(ray_job: dict[str, Any]):
    python, flag, module, *arguments = shlex.split(ray_job["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "jobs.label")
    config = parse(LabelConfig, arguments, command="label", description="")
    config.check()
    [gpu] = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.num_workers == f"1..{gpu['maxReplicas']}"


# ---------------------------------------------------------------------------------------------------------------
# The image


def read_dockerfile() -> list[tuple[str, str]]:
    """Its instructions and what they say, with continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "deploy/Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]  # type: ignore[misc]


def test_the_dockerfile_has_only_instructions_that_docker_knows_and_commands_that_bash_does():
    steps = read_dockerfile()
    assert {name for name, _ in steps} <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER"}
    for _, command in (step for step in steps if step[0] == "RUN"):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_the_image_is_made_from_is_there_and_not_left_out():
    ignored, *kept = [
        line
        for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored == "*"
    kept = {line.removeprefix("!").rstrip("/") for line in kept if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for name, step in read_dockerfile()
        if name == "COPY"
        for source in [word for word in step.split() if not word.startswith("--")][:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    # The wheel is made of these, and of what its metadata name.
    assert copied >= {"pyproject.toml", "jobs", "pipeline", PROJECT["readme"], *PROJECT["license-files"]}


def test_the_image_is_not_root_and_starts_no_ray_without_a_token():
    steps = read_dockerfile()
    assert [step for name, step in steps if name == "USER"][-1] == "1000"
    assert ("ENV", "RAY_AUTH_MODE=token") in steps


def test_the_programs_that_the_image_is_tried_with_exist():
    commands = " ".join(step for name, step in read_dockerfile() if name == "RUN")
    assert "nightshift label --help" in commands and "nightshift" in PROJECT["scripts"]


# ---------------------------------------------------------------------------------------------------------------
# One set of versions


def test_every_file_runs_the_ray_of_the_lock_on_one_python():
    [ray] = read_lock()["ray"]
    tags = [
        tag for name in FILES for tag in re.findall(r"^[^#\n]*rayproject/ray:(\S+)", (ROOT / name).read_text(), re.M)
    ]
    assert len(tags) == 5 and {tag.rsplit("-", 1)[0] for tag in tags} == {f"{ray}-py312"}
    ray_job = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == ray
    assert "--python 3.12 " in (ROOT / "deploy/on-premises.yaml").read_text()


def test_every_version_that_a_file_pins_is_that_of_the_lock():
    lock = read_lock()
    texts = [(ROOT / name).read_text() for name in (*FILES, "docs/clusters.md")]
    pins = {pin for text in texts for pin in re.findall(r"(?<![\w^-])([a-z][\w.-]*)==([\d.]+)", text)}
    # Only a head on Google's machines needs this one, and whoever starts it; they agree.
    assert [name for name, _ in pins if name not in lock] == ["google-api-python-client"]
    assert all(lock[name] == {version} for name, version in pins if name in lock)


def test_every_installation_follows_the_lock():
    lines = [line for name in CLUSTERS for line in list_commands(read_cluster(name))]
    lines += [step for name, step in read_dockerfile() if name == "RUN"]
    installs = [line for line in lines if "uv pip install" in line and not line.endswith("--no-deps .")]
    assert len(installs) == 6
    assert all(re.search(r"--constraint (~/nightshift/)?requirements\.lock", line) for line in installs)


def test_what_ray_needs_to_start_nodes_on_aws_is_in_the_lock():
    assert "boto3" in read_lock()
    assert {"ray", "torch", "torchvision", "pyarrow"} <= read_lock().keys()


def test_the_cluster_has_the_dashboard_and_the_jobs_api():
    [requirement] = [line for line in PROJECT["dependencies"] if line.startswith("ray[")]
    assert "default" in re.search(r"\[(.*?)\]", requirement)[1].split(",")
    assert {"aiohttp", "aiohttp-cors", "prometheus-client"} <= read_lock().keys()


def test_images_have_the_version_of_the_project():
    tags = [tag for name in FILES for tag in re.findall(r"example\.com/nightshift:([\w.]+)", (ROOT / name).read_text())]
    assert tags and set(tags) == {PROJECT["version"]}


def test_no_file_listens_on_all_addresses_or_contains_a_secret():
    for name in FILES:
        text = (ROOT / name).read_text()
        assert "0.0.0.0" not in text
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|RAY_AUTH_TOKEN=", text)
        json.dumps(text)  # printable throughout
