"""A board behind ssh: sshd on loopback, whose Python is the emulated one, below a path with a quote in it."""

import json
import subprocess
import sys
import threading
import time

import psutil
import pytest
from helpers import make_images, require_schema
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.errors import HostError
from wasi_export.runtimes.targets.address import open_target

pytestmark = pytest.mark.slow


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def firmware(ssh_board):
    """Gives the board the firmware of a Raspberry Pi that answers as told."""

    def answer(throttled: str) -> None:
        ssh_board.install(
            "vcgencmd",
            f"case $1 in get_throttled) echo throttled={throttled};;\n"
            "pmic_read_adc) echo 'VDD_CORE_A current(7)=2.0A'; echo 'VDD_CORE_V volt(15)=0.8V';;\nesac",
        )

    yield answer
    (ssh_board.folder / "bin" / "vcgencmd").unlink(missing_ok=True)


def test_latencies_of_a_board_come_with_what_it_told(ssh_board, firmware, finished_bundle):
    firmware("0x0")
    done = run("bench", finished_bundle, "--rounds", 3, "--target", ssh_board.address, "--json")
    assert done.exit_code == 0, done.stderr
    benchmark = json.loads(done.stdout)
    assert benchmark["latency"][0]["model"] == str(finished_bundle)
    samples = benchmark["board"]["samples"]
    assert samples[0]["seconds"] < 0
    assert samples[0]["throttled"] == 0
    assert samples[0]["watts"] == pytest.approx(1.6)


def test_a_latency_of_a_throttled_board_is_no_data_and_all_else_is_checked(
    ssh_board, firmware, learning_bundle
):
    firmware("0x50005")
    limits = ("--baseline", learning_bundle, "--max-latency-ratio", "20", "--rounds", 5)
    done = run("validate", learning_bundle, "--target", ssh_board.address, *limits, "--json")
    assert done.exit_code == 5, done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert found["latency ratio"]["status"] == "no data"
    assert found["latency ratio"]["detail"] == "not valid: under-voltage, throttling"
    assert report["latency"] == report["layers"] == []
    assert found["parity error"]["status"] == found["training as here"]["status"] == "passed"
    assert "200 steps" in found["training as here"]["detail"]
    assert {check["evidence"] for check in report["checks"]} == {"device"}


def test_several_boards_at_once_and_one_that_is_missing_is_told(ssh_board):
    missing = "ssh://127.0.0.1:1"
    done = run("doctor", "--target", ssh_board.address, "--target", missing, "--json")
    assert done.exit_code == 3
    require_schema("targets", done.stdout)
    here, there = json.loads(done.stdout)["targets"]
    assert here["result"]["facts"]["machine"] == "aarch64"
    assert there["error"]["type"] == "HostError"
    assert f"error: {missing}: no connection" in done.stderr


def test_learning_goes_on_where_it_was_and_comes_home(ssh_board, learning_bundle, tmp_path):
    images = make_images(tmp_path / "images")
    words = ("adapt", learning_bundle, "--data", images, "--val", images, "--state", tmp_path / "state")
    stopped = run(*words, "--max-seconds", "0.001", "--target", ssh_board.address, "--json")
    assert stopped.exit_code == 0, stopped.stderr
    assert json.loads(stopped.stdout)["ended"] == ""
    there = run(*words, "--target", ssh_board.address, "--json")
    assert json.loads(there.stdout)["ended"]
    at_home = run(*words, "--json")  # the state is whole here, and at its end
    assert json.loads(at_home.stdout) == json.loads(there.stdout)


def test_a_lost_connection_ends_the_program_on_the_board(ssh_board):
    target = open_target(ssh_board.address)
    errors: list[HostError] = []

    def work() -> None:
        try:
            target.run(("-c", "import time; time.sleep(600)  # lost"), seconds=300)
        except HostError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    program = wait_for_program("# lost", "supervise")
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "sshd" and "@notty" in " ".join(process.info["cmdline"] or ()):
            process.kill()
    thread.join(60)
    assert [str(error).partition(" to ")[0] for error in errors] == ["no connection"]
    psutil.wait_procs([program], timeout=30)
    assert not program.is_running() or program.status() == psutil.STATUS_ZOMBIE
    target.close()


def test_a_client_that_is_killed_ends_the_program_on_the_board(ssh_board):
    code = (
        "from wasi_export.runtimes.targets.address import open_target\n"
        "program = 'import time; time.sleep(600)  # killed'\n"
        f"open_target({ssh_board.address!r}).run(('-c', program), seconds=300)"
    )
    client = subprocess.Popen([sys.executable, "-c", code])
    program = wait_for_program("# killed", "supervise")
    client.kill()
    client.wait()
    psutil.wait_procs([program], timeout=30)
    assert not program.is_running() or program.status() == psutil.STATUS_ZOMBIE


def test_a_board_without_room_is_told_and_left_clean(ssh_board):
    if not ssh_board.small:
        pytest.skip("a file system that is too small can only be made as root")
    done = run("doctor", "--target", ssh_board.address.replace("/data", "/small"))
    assert done.exit_code == 3
    assert "No space left on device" in done.stderr
    assert "make room on the board" in done.stderr
    with open_target(ssh_board.address) as target:
        program = f"import os; print(os.listdir({str(ssh_board.folder / 'small')!r}))"
        assert target.run(("-c", program), seconds=60).stdout == "[]\n"


@pytest.fixture
def pretend(ssh_board):
    """Gives the board another `python3`."""
    python = ssh_board.folder / "bin" / "python3"
    kept = python.read_text(encoding="utf-8")
    yield lambda script: ssh_board.install("python3", script)
    python.write_text(kept, encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'python3: not found' >&2; exit 127", "not found: install it on the board"),
        ("""echo '[[3, 11], "aarch64", 32, "glibc"]'""", "32-bit Python on aarch64"),
        ("""echo '[[3, 9], "aarch64", 64, "glibc"]'""", "Python 3.9: 3.11 or newer is needed"),
        ("""echo '[[3, 12], "aarch64", 64, ""]'""", "another libc than glibc"),
        ("echo hello", "does not tell what it is"),
    ],
    ids=["none", "32 bits", "old", "musl", "nonsense"],
)
def test_a_board_whose_python_cannot_run_it_is_told(ssh_board, pretend, script, message):
    pretend(script)
    done = run("doctor", "--target", ssh_board.address)
    assert done.exit_code == 3
    assert message in done.stderr


def wait_for_program(*words: str) -> psutil.Process:
    """Returns the program that has all the words in its command line."""
    for _ in range(300):
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            if all(word in line for word in words) and "qemu" in line:
                return process
        time.sleep(0.1)
    raise AssertionError(f"no program with {words}")
