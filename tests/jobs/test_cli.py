import dataclasses
import subprocess
import sys

import pytest

from jobs.cli import parse, run_command, to_arguments
from jobs.finetune import FinetuneConfig
from jobs.label import LabelConfig
from pipeline.errors import ConfigError, InterruptedRunError, NoImagesError, PipelineError


def parse_label(*arguments: str) -> LabelConfig:
    return parse(LabelConfig, list(arguments), command="label", description="")


def test_every_setting_of_the_config_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_label("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(LabelConfig):
        assert field.name == "inputs" or f"--{field.name.replace('_', '-')}" in printed


def test_patterns_do_not_swallow_inputs():
    config = parse_label("--include", "*.jpg", "--include", "*.png", "photos", "more", "--exclude", "x*")
    assert (config.include, config.exclude, config.inputs) == (("*.jpg", "*.png"), ("x*",), ("photos", "more"))


def test_flags_take_numbers_words_and_triples():
    config = parse_label("a", "-k", "3", "-b", "auto", "--shard-size", "64", "--mean", "0.1", "0.2", "0.3")
    assert (config.top_k, config.batch_size, config.shard_size, config.mean) == (3, "auto", 64, (0.1, 0.2, 0.3))


def test_unknown_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_label("photos", "--top", "3")
    assert ended.value.code == 2
    assert "--top-k" in capsys.readouterr().err


def test_flags_override_the_file(tmp_path):
    (tmp_path / "job.yaml").write_text("inputs: [photos]\ntop-k: 3\nmean: [0.5, 0.5, 0.5]\nmodel: resnet18\n")
    config = parse_label("--config", str(tmp_path / "job.yaml"), "-k", "4")
    assert (config.inputs, config.top_k, config.model, config.mean) == (("photos",), 4, "resnet18", (0.5, 0.5, 0.5))
    assert parse_label("others", f"--config={tmp_path / 'job.yaml'}").inputs == ("others",)


@pytest.mark.parametrize(
    ("content", "message"),
    [("topk: 3", "unknown setting 'topk'; known are inputs"), ("- a", "no mapping"), ("a: [", "--config")],
)
def test_file_that_makes_no_sense_is_a_clear_error(tmp_path, content, message):
    (tmp_path / "job.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_label("--config", str(tmp_path / "job.yaml"))


def test_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        parse_label("--config", str(tmp_path / "nope.yaml"))


@pytest.mark.parametrize(
    ("error", "exit_code", "printed"),
    [
        (ConfigError("-k 0", "-b 0"), 2, "error: -k 0\nerror: -b 0\n"),
        (NoImagesError("nothing"), 2, "error: nothing\n"),
        (PipelineError("broke"), 1, "error: broke\n"),
        (InterruptedRunError("stopped", signal=15), 143, "error: stopped\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt(15), 143, "stopped\n"),
    ],
)
def test_errors_become_exit_codes_and_one_line_each(error, exit_code, printed, capsys):
    def main(arguments):
        raise error

    assert run_command(main, []) == exit_code
    assert capsys.readouterr().err == printed


def test_traceback_comes_only_when_asked_for(capsys):
    def main(arguments):
        raise PipelineError("broke")

    run_command(main, ["-v"])
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_does_not_wait_for_a_thread_that_waits_for_ever():
    """As for the answer of a store that has stalled; what was registered for the end still happens."""
    program = (
        "import atexit, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from jobs.cli import leave, run_command\n"
        "def main(arguments):\n"
        "    ThreadPoolExecutor(1).submit(threading.Event().wait)\n"
        "    raise KeyboardInterrupt\n"
        "atexit.register(print, 'cleaned up', flush=True)\n"
        "leave(run_command(main, []))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "stopped\n")


@pytest.mark.parametrize(
    "config",
    [
        LabelConfig(
            inputs=("/a", "s3://b/*.jpg"),
            include=("*.jpg", "x y"),
            mean=(0.1, 0.2, 0.3),
            output="/o",
            top_k=3,
            overwrite=True,
            gpus_per_worker=0.5,
            num_workers="2..4",
            limit=5,
        ),
        FinetuneConfig(inputs=("/a",), val=("/v", "/w"), output="/o", lr=1e-5, target="column", warmup_epochs=0.5),
        LabelConfig(),
    ],
)
def test_settings_come_back_from_the_arguments_that_they_make(config):
    assert parse(type(config), to_arguments(config), command="x", description="") == config


def test_errors_show_no_secrets(capsys):
    def fail(arguments):
        raise ConfigError("input 'ftp://me:hunter2@host/x' does not exist")

    assert run_command(fail, []) == 2
    assert run_command(fail, ["-v"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: input 'ftp://me:***@host/x' does not exist\n")
    assert "hunter2" not in errors


def test_run_is_the_same_when_a_password_changes():
    first, second = (LabelConfig(inputs=(f"ftp://me:{word}@host/x",)).identity for word in ("old", "new"))
    assert first == second
    assert first["inputs"] == ["ftp://me:***@host/x"]
    assert LabelConfig(inputs=("ftp://me:old@host/y",)).identity != first
