import pytest

from wasi_export.errors import ExitCode
from wasi_export.report import BoardRun, BoardSample, ChangedImage, Check, Comparison, Host, Latency, Report
from wasi_export.views import to_markdown

HOST = Host(
    machine="Raspberry Pi 5 Model B, aarch64",
    processor="Cortex-A76",
    cores=4,
    memory_mb=8000,
    system="Linux",
    versions={"onnxruntime": "1.23.0"},
)
LATENCY = Latency(
    model="a|b",
    batch=1,
    threads=1,
    p50_ms=10.0,
    p90_ms=11.0,
    p99_ms=12.5,
    ratio_to_first=0.5,
    ratio_low=0.45,
    ratio_high=0.55,
    ratio_interval=(0.49, 0.51),
    noise_floor=0.015,
    load_ms=100.0,
    peak_rss_mb=90.0,
    clock="cpu",
    samples_ms=(10.0, 12.5),
)

BOARD = BoardRun(
    governor="ondemand",
    max_clock_mhz=2400.0,
    seconds=2.0,
    samples=(
        BoardSample(seconds=1.0, throttled=0, celsius=61.0, clock_mhz=2400.0, available_mb=4000, watts=None),
    ),
)


def report(*statuses: str, latency: tuple[Latency, ...] = ()) -> Report:
    checks = tuple(
        Check(name=f"check {i}", status=status, value=0.125, threshold=0.5, unit="MB", detail="a|b\nc")
        for i, status in enumerate(statuses)
    )
    return Report(bundle="b", model="m", model_sha256="0" * 64, checks=checks, latency=latency, host=HOST)


@pytest.mark.parametrize(
    ("statuses", "code", "verdict"),
    [
        (("passed", "info"), ExitCode.PASSED, "passed"),
        (
            ("passed", "failed", "no data"),
            ExitCode.CHECK_FAILED,
            "failed: check 1; nothing to check for: check 2",
        ),
        (("passed", "no data"), ExitCode.NOTHING_TO_CHECK, "nothing to check for: check 1"),
        (("passed", "undecided"), ExitCode.NOTHING_TO_CHECK, "undecided: check 1"),
        (("undecided", "failed"), ExitCode.CHECK_FAILED, "failed: check 1; undecided: check 0"),
        (("info",), ExitCode.NOTHING_TO_CHECK, "nothing was checked"),
        ((), ExitCode.NOTHING_TO_CHECK, "nothing was checked"),
    ],
)
def test_the_checks_decide_the_exit_code_and_the_verdict(statuses, code, verdict):
    assert report(*statuses).exit_code == code
    assert report(*statuses).verdict == verdict


def test_markdown_has_the_verdict_first_and_every_part():
    text = to_markdown(report("passed", "failed", latency=(LATENCY,)))
    lines = text.splitlines()
    assert lines[0] == "# ❌ m: failed: check 1"
    assert "| check 1 | ❌ failed | 0.125 MB | 0.5 MB | device | a\\|b c |" in lines
    assert "| a\\|b | 10.00 | 11.00 | 12.50 | 0.500 | 0.490–0.510 | 0.450–0.550 | 100 | 90 |" in lines
    assert "Raspberry Pi 5 Model B, aarch64" in text
    assert "onnxruntime 1.23.0" in text
    assert "CPU time of the process" in text
    assert "within 1.5%, the noise floor" in text


def test_markdown_shows_answers_that_changed_by_the_names_of_their_classes():
    changed = ChangedImage(image="c|at/1.png", label=0, baseline=0, bundle=-1)
    comparison = Comparison(
        both_right=7, lost=1, won=0, both_wrong=2, drop=0.1, interval=(-0.1, 0.3), confidence=0.95,
        p_value=1.0, changed=1, images=(changed,),
    )  # fmt: skip
    found = report("passed").model_copy(update={"comparison": comparison, "classes": ("cat", "dog")})
    lines = to_markdown(found).splitlines()
    assert "| baseline right | 7 | 1 |" in lines
    assert "| c\\|at/1.png | cat | cat | – |" in lines


def test_every_row_of_a_markdown_table_has_the_columns_of_its_header():
    blocks = to_markdown(report("passed", "no data", latency=(LATENCY,))).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({row.replace("\\|", "").count("|") for row in table}) == 1


def test_no_text_of_a_report_begins_a_tag_or_a_line_of_its_markdown():
    hostile = "a |\n\n<script>alert(1)</script>\n\n# owned"
    plain = report("failed", latency=(LATENCY,)).model_copy(update={"board": BOARD})
    made = plain.model_copy(
        update={
            **dict.fromkeys(("bundle", "model", "model_sha256", "target"), hostile),
            "checks": tuple(check.model_copy(update={"name": hostile}) for check in plain.checks),
            "latency": (LATENCY.model_copy(update={"model": hostile}),),
            "host": HOST.model_copy(update={"processor": hostile, "versions": {hostile: hostile}}),
            "board": BOARD.model_copy(update={"governor": hostile}),
        }
    )
    text = to_markdown(made)
    assert "<script" not in text
    assert not [line for line in text.splitlines() if line.startswith("# owned")]
    assert len(text.splitlines()) == len(to_markdown(plain).splitlines())


def test_the_units_of_a_board_keep_their_capitals():
    text = to_markdown(report("passed").model_copy(update={"board": BOARD}))
    assert "\n\nBoard, 2 s, 1 samples: governor ondemand, clock 2400 to 2400 MHz, at most 61 °C.\n" in text
