import json
import os
import pty
import re
import resource
import subprocess
import sys

import pytest
import typer
from helpers import require_schema
from typer.testing import CliRunner

import wasi_export
from wasi_export.cli import app, main
from wasi_export.cli._console import VERBOSITY, JsonFlag, exit_codes, note, print_json, print_table, track
from wasi_export.errors import DataError, ExitCode, IntegrityError

FAILURES = {
    "data": DataError("3 lines\n  become one"),
    "integrity": IntegrityError("changed"),
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError("oops"),
    "exit": typer.Exit(1),
}

command = typer.Typer()


@command.command()
@exit_codes
def fail(kind: str, as_json: JsonFlag = False) -> None:
    raise FAILURES[kind]


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("data", ExitCode.USAGE, "error: 3 lines become one"),
        ("integrity", ExitCode.INTEGRITY, "error: changed"),
        ("interrupt", ExitCode.INTERRUPTED, "error: interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(kind, code, line):
    result = CliRunner().invoke(command, [kind])
    assert result.exit_code == code
    assert result.stderr == line + "\n"
    assert result.stdout == ""


def test_with_json_the_error_is_an_object_as_well():
    result = CliRunner().invoke(command, ["data", "--json"])
    assert result.stderr == "error: 3 lines become one\n"
    require_schema("error", result.stdout)
    assert json.loads(result.stdout)["error"] == {
        "type": "DataError", "message": "3 lines become one", "exit_code": 2,
    }  # fmt: skip


def test_a_bug_shows_its_traceback_and_exits_70():
    result = CliRunner().invoke(command, ["bug"])
    assert result.exit_code == ExitCode.INTERNAL
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: a bug in wasi-export, please report it: ZeroDivisionError: oops\n")


def test_an_exit_code_of_a_command_is_kept():
    result = CliRunner().invoke(command, ["exit"])
    assert (result.exit_code, result.output) == (1, "")


def test_a_command_without_the_json_flag_is_our_bug():
    with pytest.raises(AssertionError, match="as_json"):
        exit_codes(lambda path: None)


def test_the_help_lists_every_command_and_exit_code():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    first_words = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    for name in ("run", "plan", "train", "export", "validate", "bench", "inspect"):
        assert name in first_words
    listed = [int(word) for word in first_words if word.isdigit()]
    assert listed == [int(code) for code in ExitCode]


def test_the_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"wasi-export {wasi_export.__version__}\n"


def test_an_unknown_option_is_a_usage_error():
    result = CliRunner().invoke(app, ["inspect", "--colour", "red"])
    assert result.exit_code == ExitCode.USAGE
    assert "--colour" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect x --bogus", "No such option: --bogus: see `wasi-export inspect --help`"),
        ("inspect", "Missing argument 'bundle': see `wasi-export inspect --help`"),
        ("validate x --rounds many", "Invalid value for '--rounds': Input should be a valid integer, …"),
        ("inspec x", "No such command 'inspec'…: see `wasi-export --help`"),
        ("-q -v inspect x", "Invalid value: --quiet and --verbose: choose one: see `wasi-export --help`"),
    ],
)
def test_with_json_what_was_typed_wrong_is_an_object_as_well(words, message, monkeypatch, capsys):
    for json_flag in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["wasi-export", *words.split(), *json_flag])
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        assert ended.value.code == ExitCode.USAGE
        assert "Error: " in found.err
        if json_flag:
            require_schema("error", found.out)
            error = json.loads(found.out)["error"]
            assert (error["type"], error["exit_code"]) == ("UsageError", 2)
            assert re.fullmatch(re.escape(message).replace("…", ".*"), error["message"])
        else:
            assert found.out == ""


@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("inspect nowhere", 6), ("--help", 0)])
def test_the_program_ends_with_the_exit_code_of_the_command(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wasi-export", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == code


@pytest.mark.parametrize("name", ["numpy", "onnxruntime", "pydantic", "torch", "PIL"])
def test_the_help_imports_nothing_heavy(name):
    code = f"import sys; sys.modules[{name!r}] = None; from wasi_export.cli import app; app(['--help'])"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_help_takes_less_than_300_ms():
    command = [sys.executable, "-m", "wasi_export", "--help"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3  # CPU time of one thread: the wall clock of a machine that is not busy


def test_verbose_tells_where_an_error_comes_from_and_quiet_and_normal_do_not(tmp_path):
    for option, told in (("--verbose", True), ("-q", False), (None, False)):
        result = CliRunner().invoke(app, [*([option] if option else []), "inspect", str(tmp_path / "absent")])
        assert result.exit_code == ExitCode.INTEGRITY
        assert result.stderr.splitlines()[-1].startswith("error: no bundle at")
        assert ("Traceback" in result.stderr) == told
    assert CliRunner().invoke(app, ["-q", "-v", "inspect", "x"]).exit_code == ExitCode.USAGE


@pytest.mark.parametrize(("verbosity", "said"), [("quiet", ""), ("normal", "busy\n"), ("verbose", "busy\n")])
def test_quiet_leaves_out_what_is_no_result(capsys, verbosity, said):
    token = VERBOSITY.set(verbosity)
    try:
        note("busy")
        print_table("table", ("a",), [("1",)])
    finally:
        VERBOSITY.reset(token)
    found = capsys.readouterr()
    assert found.err == said
    assert "table" in found.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell):
    environment = os.environ | {"_WASI_EXPORT_COMPLETE": f"complete_{shell}"} | {
        "bash": {"COMP_WORDS": "wasi-export val", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "wasi-export val"},
        "fish": {"_TYPER_COMPLETE_ARGS": "wasi-export val", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]  # fmt: skip
    command = [sys.executable, "-m", "wasi_export"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "validate" in done.stdout


def test_away_from_a_terminal_progress_is_silent(capsys):
    assert list(track([1, 2], "loading", 2)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_progress_is_shown_on_stderr_even_nested():
    code = (
        "from wasi_export.cli._console import track\n"
        "print([i + j for i in track([10, 20], 'outer', 2) for j in track([1, 2], 'inner', 2)])"
    )
    reader, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, check=True, env=environment
        )
        shown = os.read(reader, 100_000).decode()
    finally:
        os.close(reader)
        os.close(terminal)
    assert done.stdout == b"[11, 12, 21, 22]\n"
    assert "outer" in shown
    assert "inner" in shown


def test_a_table_away_from_a_terminal_is_never_cut(capsys):
    print_table("wide", ("name", "value"), [("[bold]" * 60, "1"), ("short", "22")])
    lines = capsys.readouterr().out.splitlines()
    assert any("[bold]" * 60 in line for line in lines)
    assert any(line.split() == ["short", "22"] for line in lines)


def test_json_on_stdout_is_strict(capsys):
    print_json({"error": float("inf"), "classes": ("é",)})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "error": None,
        "classes": ["é"],
    }
