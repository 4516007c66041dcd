import json
import signal
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path

import pytest
from helpers import SPEC, require_schema
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.cli._summary import ModelSummary, RunSummary
from wasi_export.cli._sweep import Job, Part, read_sweep
from wasi_export.cli._sweep_table import Spread, SweepTable, merge
from wasi_export.config import Config
from wasi_export.durable import locked_folder
from wasi_export.errors import ConfigError, UsageError
from wasi_export.locks import is_locked
from wasi_export.run_folder import RunFacts

# Wide enough for its factors to pay, trained far too short to be good.
CONFIG = """
[model]
name = "vit_tiny_patch16_224"
img_size = 16
in_chans = 1
kwargs = { embed_dim = 128, depth = 1, num_heads = 2, patch_size = 4 }
[data]
source = "digits"
train_images = 64
val_images = 20
batch_size = 16
[subspace]
calibration_images = 32
[train.dense]
epochs = 1
[train.subspace]
epochs = 1
"""


@pytest.fixture
def job_file(tmp_path):
    """Returns a function that writes a job file from its own lines, with the configuration below them."""

    def write(sweep, config=CONFIG):
        path = tmp_path / "sweep.toml"
        path.write_text(sweep + config)
        return path

    return write


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def names(jobs):
    return [job.name for job in jobs]


def test_the_jobs_are_the_product_and_the_last_key_changes_fastest(job_file):
    jobs = read_sweep(job_file('[sweep]\n"subspace.fraction" = [0.2, 0.4]\nseed = [0, 7]\n'))
    assert names(jobs) == [
        "subspace.fraction=0.2,seed=0",
        "subspace.fraction=0.2,seed=7",
        "subspace.fraction=0.4,seed=0",
        "subspace.fraction=0.4,seed=7",
    ]
    assert [(job.config.subspace.fraction, job.config.seed) for job in jobs] == [
        (0.2, 0), (0.2, 7), (0.4, 0), (0.4, 7),
    ]  # fmt: skip
    assert {job.config.data.train_images for job in jobs} == {64}


def test_a_table_sets_several_keys_together(job_file):
    jobs = read_sweep(
        job_file('[sweep]\nmodel = [{ name = "deit_tiny_patch16_224", img_size = 32 }, { in_chans = 3 }]\n')
    )
    assert names(jobs) == ["model.name=deit_tiny_patch16_224,model.img_size=32", "model.in_chans=3"]
    first, second = (job.config.model for job in jobs)
    assert (first.name, first.img_size, first.in_chans) == ("deit_tiny_patch16_224", 32, 1)
    assert (second.name, second.img_size, second.in_chans) == ("vit_tiny_patch16_224", 16, 3)


def test_strings_lists_and_switches_are_values(job_file):
    (job,) = read_sweep(
        job_file('[sweep]\n"subspace.include" = [["*fc1", "*fc2"]]\n"data.augment" = [false]\n')
    )
    assert job.config.subspace.include == ("*fc1", "*fc2")
    assert job.config.data.augment is False


def test_the_configuration_may_be_in_another_file(job_file, tmp_path):
    (tmp_path / "base.toml").write_text(CONFIG)
    path = job_file('base = "base.toml"\n[sweep]\nseed = [3]\n', "")
    (job,) = read_sweep(path, ["data.train_images=32"])
    assert (job.config.seed, job.config.data.train_images, job.config.model.img_size) == (3, 32, 16)


def test_an_ordinary_configuration_is_no_sweep(job_file):
    assert read_sweep(job_file("")) is None


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("[sweep]\n", r"\[sweep\] must list values for some keys, got \{\}"),
        ("[sweep]\nseed = 3\n", r"sweep\.seed must be a list of values, got 3"),
        ("[sweep]\nseed = []\n", r"sweep\.seed must be a list of values, got \[\]"),
        ("[sweep]\nseed = [1, 1]\n", r"lists seed=1 twice"),
        ("[sweep]\nsede = [1]\n", r"sede=1: unknown key 'sede'"),
        ('[sweep]\n"subspace.fraction" = [0.2, 1.2]\n', r"fraction=1\.2: .*less than 1, got 1\.2"),
        ("[sweep]\nseed = [2026-01-01]\n", r"sweep\.seed: datetime\.date\(2026, 1, 1\) is no value"),
        ('base = "base.toml"\n[sweep]\nseed = [1]\n', r"but \[model\] is here"),
    ],
)
def test_a_wrong_sweep_is_one_line(job_file, sweep, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(job_file(sweep))


@given(text=st.text(min_size=1, max_size=400), other=st.text(min_size=1, max_size=400))
def test_a_name_is_that_of_a_folder_and_of_one_job_only(text, other):
    first, second = (Job((("data.source", json.dumps(value)),), Config()).name for value in (text, other))
    assert len(first.encode()) < 200
    assert "/" not in first
    assert first.startswith("data.source=")
    assert (first == second) == (json.dumps(text).strip('"') == json.dumps(other).strip('"'))


@given(count=st.integers(1, 12), jobs=st.integers(0, 40))
def test_every_job_is_in_one_part_and_parts_are_even(count, jobs):
    parts = [Part.parse(f"{index}/{count}").of(range(jobs)) for index in range(1, count + 1)]
    assert sorted(job for part in parts for job in part) == list(range(jobs))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "-1/4", "a/b", "1/4/2", ""])
def test_a_part_that_does_not_exist_is_refused(text):
    with pytest.raises(UsageError, match=r"--array reads I/N with I from 1 to N"):
        Part.parse(text)


def test_a_dry_run_lists_the_jobs_of_a_part(job_file):
    path = job_file('[sweep]\n"subspace.rank" = [8, 16, 24]\n')
    assert run(path, "--dry-run").stdout.split() == [f"subspace.rank={rank}" for rank in (8, 16, 24)]
    assert run(path, "--dry-run", "--array", "2/2").stdout.split() == ["subspace.rank=16"]
    require_schema("jobs", run(path, "--dry-run", "--json").stdout)


@pytest.mark.parametrize(
    ("sweep", "options", "line"),
    [
        ("", ("--array", "1/2"), "has no table [sweep]"),
        ("", ("--merge",), "has no table [sweep]"),
        ("[sweep]\nseed = [1]\n", ("--force",), "--force and --dense are for a single run"),
        ("[sweep]\nseed = [1]\n", ("--array", "3/2"), "--array reads I/N"),
    ],
)
def test_an_option_that_does_not_apply_is_one_line(job_file, sweep, options, line):
    result = run(job_file(sweep), *options)
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_on_several_processes_is_refused(job_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(job_file(""))
    assert result.exit_code == 2
    assert "run is one process, WORLD_SIZE is 2" in result.stderr


def test_a_folder_is_locked_for_others_and_free_again(tmp_path):
    folder = tmp_path / "new"
    assert not is_locked(folder)
    with locked_folder(folder):
        assert is_locked(folder)
        with pytest.raises(UsageError, match="is in use by another process"), locked_folder(folder):
            pass
    assert not is_locked(folder)
    with locked_folder(folder, wait=True):
        pass


def model_summary(accuracy, ratio, memory=None):
    return ModelSummary(
        model="m",
        accuracy=accuracy,
        parameters=1000,
        size_mb=1.0,
        latency_ms=2.0,
        latency_ratio=ratio,
        step_memory_mb=memory,
    )


def finished(folder, job, accuracy, *, memory=None, code=0):
    """Writes what a finished job leaves of its training, and returns its summary."""
    path = folder / job.name / "subspace" / "run.json"
    path.parent.mkdir(parents=True)
    facts = RunFacts(
        name="tiny",
        method="subspace",
        classes=("dark", "light"),
        input=SPEC,
        seed=0,
        parameters=1000,
        metrics={"seconds": 10 * accuracy},
        data_fingerprint=None,
        key="key",
        weights_sha256="0" * 64,
    )
    path.write_text(facts.model_dump_json())
    return RunSummary(
        name="tiny",
        verdict="passed" if code == 0 else "failed",
        exit_code=code,
        dense=model_summary(0.9, 1.0),
        low_rank=model_summary(accuracy, 0.5, memory),
        dense_int8=model_summary(0.9, 0.4),
        low_rank_int8=model_summary(accuracy, 0.3),
        bundle=path,
        report=path,
    )


def test_the_table_has_a_row_for_each_setting_and_its_seeds_as_mean_and_deviation(job_file, tmp_path):
    jobs = read_sweep(job_file('[sweep]\nseed = [0, 1]\n"subspace.fraction" = [0.2, 0.4]\n'))
    out = tmp_path / "out"
    summaries = {
        jobs[0].name: finished(out, jobs[0], 0.7, memory=10),
        jobs[1].name: finished(out, jobs[1], 0.8, code=1),
        jobs[2].name: finished(out, jobs[2], 0.9, memory=14),
    }
    table = merge(jobs, out, lambda job: summaries.get(job.name))
    assert table.title == "3 of 4 jobs are finished"
    assert table.unfinished == ("seed=1,subspace.fraction=0.4",)
    assert SweepTable.model_validate_json((out / "sweep.json").read_bytes()) == table
    columns, (low, high), _ = table.cells()
    assert columns == (
        "subspace.fraction", "runs", "dense accuracy", "accuracy", "parameters", "latency ratio",
        "training MB", "training s", "passed",
    )  # fmt: skip
    assert low == (
        "0.2", "2", "0.9000 ± 0.0000", "0.8000 ± 0.1414", "1,000 ± 0", "0.500 ± 0.000", "12 ± 3", "8 ± 1",
        "2/2",
    )  # fmt: skip
    assert high == ("0.4", "1", "0.9000", "0.8000", "1,000", "0.500", "–", "8", "0/1")
    markdown = (out / "sweep.md").read_text().splitlines()
    assert markdown[0] == "3 of 4 jobs are finished."
    assert markdown[2].count("|") == markdown[4].count("|") == len(columns) + 1


def test_settings_of_different_models_share_one_table(job_file, tmp_path):
    jobs = read_sweep(job_file("[sweep]\nmodel = [{ img_size = 16 }, { in_chans = 3 }]\n"))
    summaries = {job.name: finished(tmp_path / "out", job, 0.5) for job in jobs}
    columns, rows, align = merge(jobs, tmp_path / "out", lambda job: summaries[job.name]).cells()
    assert columns[:2] == ("model.img_size", "model.in_chans")
    assert [row[:2] for row in rows] == [("16", ""), ("", "3")]
    assert {len(columns), *map(len, rows), len(align)} == {len(columns)}


def test_nothing_finished_is_an_empty_table(job_file, tmp_path):
    result = run(job_file("[sweep]\nseed = [0, 1]\n"), "-o", tmp_path / "out", "--merge", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == []
    assert json.loads(result.stdout)["unfinished"] == ["seed=0", "seed=1"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text('{"metrics": {}}')])
def test_a_job_whose_run_is_gone_or_damaged_is_not_finished_and_the_others_are(
    job_file, tmp_path, damage, capsys
):
    jobs = read_sweep(job_file("[sweep]\nseed = [0, 1]\n"))
    summaries = {job.name: finished(tmp_path, job, 0.5) for job in jobs}
    damage(tmp_path / "seed=0" / "subspace" / "run.json")
    table = merge(jobs, tmp_path, lambda job: summaries[job.name])
    assert [job.name for job in table.jobs] == ["seed=1"]
    assert table.unfinished == ("seed=0",)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not in the table: seed=0: ")
    assert "run.json is not what a run wrote" in line


@pytest.fixture
def job_process(tmp_path, monkeypatch):
    """Returns a function that puts a shell script in the place of the Python that runs jobs."""

    def install(script):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return install


def test_a_job_that_cannot_begin_does_not_stop_the_others_nor_the_table(job_file, tmp_path, job_process):
    path, out = job_file('[sweep]\n"data.source" = ["no/where", "digits"]\nseed = [0, 1]\n'), tmp_path / "out"
    damaged = out / "data.source=digits,seed=0" / "stages.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    job_process(f'echo "$@" >> {tmp_path}/jobs')
    result = run(path, "-o", out)
    assert result.exit_code == 6
    lines = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert ["error: no data source 'no/where'" in line for line in lines] == [True, True, False, False]
    assert f"error: {damaged} is not a list of stages" in lines[2]
    (begun,) = (tmp_path / "jobs").read_text().splitlines()
    assert f" run {out}/data.source=digits,seed=1/config.toml " in begun
    assert "0 of 4 jobs are finished" in result.stdout

    merged = run(path, "-o", out, "--merge", "--json")
    assert merged.exit_code == 0
    assert len(json.loads(merged.stdout)["unfinished"]) == 4
    assert merged.stderr.count("not in the table: ") == 3


def test_a_job_that_failed_is_the_exit_code_where_another_is_undecided(job_file, tmp_path, job_process):
    path = job_file('[sweep]\n"subspace.fraction" = [0.2, 0.4]\n')
    job_process('case "$*" in *=0.2*) exit 1;; *) exit 5;; esac')
    assert run(path, "-o", tmp_path / "out").exit_code == 1


@pytest.mark.parametrize(("flags", "passed_on"), [([], ""), (["-q"], "--quiet "), (["-v"], "--verbose ")])
def test_jobs_say_as_much_as_the_sweep(job_file, tmp_path, job_process, flags, passed_on):
    path = job_file("[sweep]\nseed = [0]\n")
    job_process(f'echo "$@" > {tmp_path}/words')
    words = [*flags, "run", str(path), "-o", str(tmp_path / "out")]
    result = copy_context().run(CliRunner().invoke, app, words)  # tests after this one are not told more
    assert result.exit_code == 0
    assert (tmp_path / "words").read_text().startswith(f"-m wasi_export {passed_on}run ")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_a_spread_holds_its_mean(values):
    spread = Spread.of(values)
    assert min(values) - 1e-6 <= spread.mean <= max(values) + 1e-6
    assert (spread.std is None) == (len(values) == 1)


@pytest.mark.slow
def test_parts_run_all_jobs_share_the_dense_run_and_merge(job_file, tmp_path):
    """The second part's jobs fail, both of them, and take nothing from the first's."""
    path = job_file('[sweep]\n"subspace.fraction" = [0.4, 0.5]\n"train.subspace.opt" = ["adamw", "adamx"]\n')
    out = tmp_path / "out"
    failed = run(path, "-o", out, "--array", "2/2", "--json")
    assert failed.exit_code == 2
    assert failed.stderr.count("ended with exit code 2") == 2
    assert json.loads(failed.stdout)["jobs"] == []

    done = run(path, "-o", out, "--array", "1/2", "--json")
    assert done.exit_code == 0, done.output
    require_schema("sweep", done.stdout)
    table = json.loads(done.stdout)
    assert [row["runs"] for row in table["rows"]] == [1, 1]
    assert len(table["unfinished"]) == 2
    assert table["rows"][0]["parameters"]["mean"] < table["rows"][1]["parameters"]["mean"]
    assert len(list(out.glob("dense-*"))) == 1
    assert not list(out.glob("*/dense"))

    again = run(path, "-o", out, "--array", "1/2")
    assert again.exit_code == 0
    assert again.stderr.count("finished already") == 2
    assert "2 of 4 jobs are finished" in again.stdout

    with locked_folder(out / "subspace.fraction=0.4,train.subspace.opt=adamx"):
        busy = run(path, "-o", out, "--array", "2/4")
    assert busy.exit_code == 0
    assert "another process is running it" in busy.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_job_and_the_same_command_goes_on(job_file, tmp_path, number):
    path = job_file('[sweep]\n"subspace.fraction" = [0.4]\n')
    command = [sys.executable, "-m", "wasi_export", "run", path, "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [*command, "-s", "train.dense.epochs=200"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert any(line.startswith("  epoch 2: ") for line in process.stderr)
    process.send_signal(number)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    assert lines[-1] == "error: interrupted: the same command goes on"
    assert len(list(tmp_path.glob("out/dense-*/checkpoint.safetensors"))) == 1
