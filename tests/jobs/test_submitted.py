"""A command that is to run elsewhere: read here, and its places as they are seen there."""

import pytest

from jobs.submitted import find_faults, find_places, move, read_command
from pipeline.errors import ConfigError
from pipeline.jobserver import Site
from pipeline.submission import Upload


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the user is in, with what a command may name."""
    for name in ("photos", "code/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "code/model/config.json").write_text("{}")
    (tmp_path / "code/my_net.py").touch()
    (tmp_path / "my_net.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_site(**changes) -> Site:
    node = {"CPU": 8.0}
    return Site(
        **{"ray_version": "2.60.0", "python_version": "3.11.7", "nodes": (node, node), "is_here": False} | changes
    )


HERE = {"is_here": True, "can_grow": False}
AWAY = {"is_here": False, "can_grow": False}


def list_faults(words, upload=None, *, shared=(), **site):
    return list(find_faults(read_command(words), make_site(**site), upload, shared=shared))


def test_on_this_host_relative_paths_become_absolute_and_names_stay(folder):
    config = read_command(["label", "photos", "s3://b/x", "-o", "out", "-m", "resnet50"]).config
    moved = move(config, make_site(**HERE), None)
    assert moved.inputs == (f"{folder}/photos", "s3://b/x")
    assert (moved.output, moved.model, moved.weights) == (f"{folder}/out", "resnet50", "DEFAULT")


def test_embed_runs_on_a_cluster_as_label_does(folder):
    words = ["embed", "photos", "-o", "out", "--embedding-dtype", "float16", "-m", "code/model"]
    moved = move(read_command(words).config, make_site(**HERE), None)
    assert (moved.output, moved.model, moved.embedding_dtype) == (f"{folder}/out", f"{folder}/code/model", "float16")
    assert list_faults(["embed", "photos"], **HERE) == ["-o: name a folder for the embeddings"]


def test_paths_in_a_config_file_are_moved_as_well(folder):
    (folder / "label.yaml").write_text("inputs: [photos]\noutput: out\ntop_k: 3\n")
    command = read_command(["label", "--config", "label.yaml"])
    moved = move(command.config, make_site(**HERE), None)
    assert (moved.inputs, moved.output, moved.top_k) == ((f"{folder}/photos",), f"{folder}/out", 3)


def test_model_travels_in_the_working_directory_and_inputs_do_not(folder):
    words = ["label", "s3://b/x", "-o", "s3://b/y", "-m", "code/model"]
    upload = Upload(str(folder / "code"))
    (fault,) = list_faults(words, **AWAY)
    assert fault.startswith("--model code/model: is on this machine, and the nodes of the cluster cannot see it")
    assert list_faults(words, upload, **AWAY) == []
    assert move(read_command(words).config, make_site(**AWAY), upload).model == "model"
    faults = list_faults(["label", "photos", "-o", "out"], upload, **AWAY)
    assert [fault.split(":")[0] for fault in faults] == ["INPUT photos", "-o out"]
    assert list_faults(["label", "photos", "-o", "out"], shared=[str(folder)], **AWAY) == []


def test_factory_that_would_stay_here_is_a_fault_on_any_cluster(folder):
    words = ["finetune", "s3://b/x", "-o", "s3://b/y", "-m", "my_net:make"]
    for site in (HERE, AWAY):
        (fault,) = list_faults(words, **site)
        assert fault == "--model my_net:make: 'my_net.py' would stay here; send it along with --working-dir ."
        assert list_faults(words, Upload(str(folder)), **site) == []


def test_all_places_of_a_command_are_known(folder):
    config = read_command(["finetune", "photos", "-o", "out", "--val", "v", "--weights", "w.pth"]).config
    places = {(place.flag, place.value, place.is_read_by_all) for place in find_places(config)}
    assert places == {
        ("INPUT", "photos", True),
        ("-o", "out", True),
        ("--val", "v", True),
        ("--weights", "w.pth", False),
    }


def test_an_evaluation_takes_its_table_along_and_has_a_place_for_labels(folder):
    words = ["evaluate", "s3://b/x", "-o", "s3://b/y", "--targets", "code/truth.csv"]
    (folder / "code/truth.csv").touch()
    (fault,) = list_faults(words, **AWAY)
    assert fault.startswith("--targets code/truth.csv: is on this machine")
    upload = Upload(str(folder / "code"))
    assert list_faults(words, upload, **AWAY) == []
    assert move(read_command(words).config, make_site(**AWAY), upload).targets == "truth.csv"
    assert list_faults(["evaluate", "s3://b/labels"], **AWAY) == ["-o: name a folder for the result"]


def test_faults_of_the_command_itself_cost_nothing(folder):
    faults = list_faults(["label", "photos", "-k", "0", "--address", "10.0.0.1:6379", "--num-workers", "x"], **HERE)
    assert [fault.split(" ")[0] for fault in faults] == ["--top-k", "--num-workers", "-o:", "--address"]


@pytest.mark.parametrize("words", [[], ["models"], ["submit"], ["lable"]])
def test_what_does_not_run_on_a_cluster_is_refused(words):
    with pytest.raises(ConfigError, match="the commands that work on a cluster are label, embed, finetune, evaluate"):
        read_command(words)


def test_shown_command_has_no_secrets():
    command = read_command(["label", "ftp://me:hunter2@host/x y", "-o", "out"])
    assert command.shown == "label 'ftp://me:***@host/x y' -o out"
