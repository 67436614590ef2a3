"""What the documentation tells people to type is understood by the programs that it names.

Nothing is run: each command of nightshift is parsed by its own parser, each of Ray by Ray's, shell is checked by bash,
Python is compiled, and files, Make's targets and links are looked up.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import jobs.cli
from jobs.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Files whose comments and texts show commands, in lines of their own.
COMMENTED = sorted(
    [
        ROOT / "cluster.yaml",
        *(ROOT / "deploy").iterdir(),
        *(path for folder in ("jobs", "pipeline", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    ]
)
_PLACEHOLDER = re.compile(r"…|\.\.\.|<[a-z-]+>")


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A piece of text that is to be understood by a program."""

    place: str
    text: str

    def __str__(self) -> str:
        return self.place


def read_blocks(path: Path, *languages: str) -> Iterator[Snippet]:
    text = path.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            line = text.count("\n", 0, match.start()) + 2
            yield Snippet(place=f"{path.relative_to(ROOT)}:{line}", text=match[2])


def read_commands(block: Snippet) -> Iterator[Snippet]:
    """What is typed in a block: all of it, or where it shows a session, what follows the prompt `$ `."""
    is_session = any(line.startswith("$ ") for line in block.text.splitlines())
    place, number = block.place.rsplit(":", 1)
    lines = iter(enumerate(block.text.splitlines(), start=int(number)))
    for at, line in lines:
        if is_session and not line.startswith("$ "):
            continue
        command = line.removeprefix("$ ") if is_session else line
        while command.endswith("\\"):
            command = f"{command[:-1]} {next(lines)[1].strip()}"
        if command.strip() and not command.lstrip().startswith("#"):
            yield Snippet(place=f"{place}:{at}", text=command)


def read_comments(path: Path) -> Iterator[Snippet]:
    """The commands of nightshift in the comments of a file, or in its docstring: lines that begin with one."""
    for at, line in enumerate(path.read_text().splitlines(), start=1):
        # Behind the command, two spaces or more before what it is for.
        if match := re.match(r"(?:#   )?(nightshift \S.*?)(?:  +\S.*)?(?<!\\)$", line):
            yield Snippet(place=f"{path.relative_to(ROOT)}:{at}", text=match[1])


SHELL = [
    command
    for page in PAGES
    for block in read_blocks(page, "console", "bash", "sh")
    for command in read_commands(block)
]
COMMENTS = [snippet for path in COMMENTED if path.is_file() for snippet in read_comments(path)]
PYTHON = [block for page in PAGES for block in read_blocks(page, "python")]


def split_programs(command: str) -> Iterator[list[str]]:
    """The simple commands of a line of shell, without what is set for them and where their output goes."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter([*lexer, ";"])
    for token in tokens:
        if set(token) <= set("<>"):
            next(tokens)  # where it goes to, or comes from
        elif set(token) <= set("|&;()"):
            if words:
                yield words
            words = []
        elif words or not re.match(r"\w+=", token):
            words.append(token)


def parse_nightshift(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command makes of its arguments: its `main` is called, and left as soon as it has parsed them."""
    name, *arguments = words
    assert name in COMMANDS, f"there is no command {name!r}"
    if "--" in arguments:  # a command for a cluster
        parse_nightshift(arguments[arguments.index("--") + 1 :], monkeypatch)
    module = importlib.import_module(f"jobs.{name}")

    def parse_and_leave(kind: type, given: list[str], **options: Any) -> Any:
        raise Parsed(jobs.cli.parse(kind, given, **options))

    with monkeypatch.context() as patch:
        patch.setattr(module, "parse", parse_and_leave)
        try:
            module.main(arguments)
        except Parsed as parsed:
            config = parsed.args[0]
        except SystemExit as exit:
            assert exit.code == 0, f"nightshift {shlex.join(words)}: is not understood"  # 0 after --help
            return None
    if hasattr(config, "check"):
        config.check()
    return config


class Parsed(Exception):
    """Ends a command's `main` before it does anything, with the config that it has parsed."""


def parse_ray(words: list[str]) -> None:
    """Let Ray's command line read its arguments; raises what it would print."""
    from ray.scripts.scripts import cli

    command: Any = cli
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"ray knows no {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_each_command_of_a_page_is_understood(snippet: Snippet, monkeypatch: pytest.MonkeyPatch):
    # An ellipsis stands for what is left out; without it, the rest has to make sense.
    text = _PLACEHOLDER.sub("", snippet.text).rstrip()
    subprocess.run(["bash", "-n", "-c", text], check=True)
    monkeypatch.chdir(ROOT)
    for program, *arguments in split_programs(text):
        match Path(program).name:
            case "nightshift":
                parse_nightshift(arguments, monkeypatch)
            case "ray":
                parse_ray(arguments)
            case "make":
                targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
                assert {word for word in arguments if word.isalpha() and word.islower()} <= targets
            case "python" if arguments[:2] and arguments[0] == "-m" and arguments[1].startswith("jobs."):
                parse_nightshift([arguments[1].removeprefix("jobs."), *arguments[2:]], monkeypatch)


@pytest.mark.parametrize("snippet", COMMENTS, ids=str)
def test_each_command_in_a_comment_is_understood(snippet: Snippet, monkeypatch: pytest.MonkeyPatch):
    text = _PLACEHOLDER.sub("", snippet.text).rstrip()
    parse_nightshift(shlex.split(text)[1:], monkeypatch)


def test_the_pages_show_commands_and_the_files_too():
    # Were the patterns above to match nothing, nothing would fail.
    assert len([snippet for snippet in SHELL if "nightshift" in snippet.text]) >= 10
    assert len(COMMENTS) >= 5 and PYTHON


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_of_a_page_compiles_and_finds_what_it_imports(block: Snippet):
    tree = ast.parse(block.text)
    compile(tree, block.place, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_mentions_exist(page: Path):
    mentioned = set(re.findall(r"`nightshift ([a-z]+)", page.read_text()))
    assert mentioned <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_headings_that_a_page_mentions_exist(page: Path):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not link or (page.parent / link).exists(), link
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings
    for name in re.findall(r"(?<![\w/.-])(?:deploy|docs|examples|benchmarks|jobs|pipeline|tests)/[\w./-]*\w", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name
