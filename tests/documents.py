"""Reads what the documents tell a user to type, and asks the real command line whether it understands it."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from packaging.requirements import Requirement

from wasi_export.cli import app
from wasi_export.cli._config import read_config
from wasi_export.cli._sweep import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
GROUP: Any = typer.main.get_command(app)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

ELSEWHERE = {
    "sudo": "needs root",
    "journalctl": "needs systemd",
    "export": "of the shell",
    "cd": "of the shell",
    "openssl": "tests/test_docs.py begins with it",
    "sha256sum": "tests/test_artifact.py",
    "npm": "tests/web runs the pages with what it installs",
}
"""Programs that are not ours and are not called by a test of the documents, each with the reason."""


@dataclass(frozen=True)
class Command:
    """A line of a page, as words."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(language: str) -> list[tuple[str, str]]:
    """Returns page and text of the fenced code of a language."""
    return [
        (str(page.relative_to(ROOT)), text)
        for page in PAGES
        for found, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if found == language
    ]


def commands() -> list[Command]:
    """Returns all commands of the blocks `sh`, which are scripts, and `console`, after a prompt."""
    scripts = blocks("sh")
    scripts += [(page, "\n".join(re.findall(r"^\$ (.*)", text, re.M))) for page, text in blocks("console")]
    return [command for page, text in scripts for command in _commands_in(page, text)]


def mentioned_options() -> list[tuple[str, str, set[str]]]:
    """Returns page, command and options of each command of ours in the text of the pages."""
    mention = re.compile(r"`wasi-export\s+([a-z][\w-]*)([^`]*)`")
    return [
        (str(page.relative_to(ROOT)), name, set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)))
        for page in PAGES
        for name, rest in mention.findall(page.read_text(encoding="utf-8"))
    ]


def mentioned_scripts() -> set[str]:
    """Returns the calls of our benchmarks in the text of the pages."""
    return {
        " ".join(call.split())
        for page in PAGES
        for call in re.findall(r"`(python benchmarks/[^`]*)`", page.read_text(encoding="utf-8"))
    }


def options_of_command(name: str) -> set[str]:
    """Returns the options that a command of ours has; KeyError: there is no such command."""
    return {"--help"}.union(*(parameter.opts for parameter in GROUP.commands[name].params))


def _commands_in(page: str, script: str) -> Iterator[Command]:
    for line in script.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if words := shlex.split(part, comments=True):
                yield Command(page, tuple(words))


def understand(words: tuple[str, ...]) -> Any:
    """Returns what the command line makes of a command, which is not run; None of one that is not ours.

    Raises:
        Exception: an option, a value, a configuration, a script or a requirement is not one that exists, or
            nothing is known of the program.
    """
    match words:
        case ("wasi-export", name, *rest):
            return _parsed(name, rest)
        case ("python", "-m", "wasi_export", name, *rest):
            return _parsed(name, rest)
        case ("srun", *rest):
            return understand(tuple(rest))
        case (".ci/validate-bundle", bundle, _, *options):
            return _parsed("validate", [bundle, *options])
        case ("torchrun", *rest):
            from torch.distributed.run import get_args_parser

            return _launched(get_args_parser().parse_args(rest))
        case ("accelerate", "launch", *rest):
            from accelerate.commands.launch import launch_command_parser

            rest = [{"RANK": "1"}.get(word, word) for word in rest]
            return _launched(launch_command_parser().parse_args(rest))
        case ("python" | "python3", "-m", "venv" | "http.server", *_):
            return None
        case ("python", script, *rest):
            known = _options_of(ROOT / script)
            unknown = [word for word in rest if word.startswith("--") and word not in known]
            assert not unknown, f"{script} has no option {unknown}"
        case (pip, "install", *rest) if Path(pip).name == "pip":
            for requirement in map(Requirement, (word for word in rest if not word.startswith("-"))):
                extras = requirement.extras if requirement.name == "wasi-export" else set()
                assert extras <= EXTRAS, f"no extra {extras - EXTRAS}"
        case ("make", target):
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"nothing makes {target}"
        case (program, *_):
            assert program in ELSEWHERE, f"nothing checks {shlex.join(words)}"
    return None


def _parsed(name: str, rest: list[str]) -> Any:
    context = GROUP.commands[name].make_context(name, list(rest))
    config, overrides = (context.params.get(key) for key in ("config", "overrides"))
    if config is not None and config.exists() and read_sweep(config, overrides or ()) is None:
        read_config(config, overrides)
    return context


def _launched(arguments: Any) -> Any:
    assert (arguments.module, arguments.training_script) == (True, "wasi_export")
    name, *rest = arguments.training_script_args
    return _parsed(name, rest)


def _options_of(script: Path) -> set[str]:
    """Returns the options that a script declares, without running it: most import torch."""
    return {
        word.value
        for call in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if call.func.attr == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant)
    }
