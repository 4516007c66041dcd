import os

import pytest

from wasi_export.errors import HostError
from wasi_export.runtimes.budget import Budget
from wasi_export.runtimes.energy import open_meter


@pytest.fixture
def powercap(tmp_path):
    """What Linux has for a processor of one package, with memory, and the whole system beside it."""
    for domain, name in (("", "package-0"), (":0", "core"), (":2", "dram")):
        write(tmp_path / f"intel-rapl:0{domain}", name, 0)
    write(tmp_path / "intel-rapl:1", "psys", 0)
    write(tmp_path / "intel-rapl-mmio:0", "package-0", 0)  # the same counter once more
    return tmp_path


def write(folder, name, energy_uj):
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", 1_000_000)):
        (folder / file).write_text(f"{value}\n")


def test_packages_and_memory_are_counted_once_from_the_start(powercap):
    write(powercap / "intel-rapl:0", "package-0", 400_000)
    meter = open_meter(powercap)
    assert meter.joules() == 0.0
    write(powercap / "intel-rapl:0", "package-0", 700_000)
    write(powercap / "intel-rapl:0:2", "dram", 50_000)
    write(powercap / "intel-rapl:0:0", "core", 250_000)  # is a part of the package
    write(powercap / "intel-rapl:1", "psys", 900_000)
    assert meter.joules() == pytest.approx(0.35)


def test_a_counter_that_goes_round_counts_on(powercap):
    meter = open_meter(powercap)
    for energy_uj, joules in ((900_000, 0.9), (100_000, 1.1), (50_000, 2.05)):
        write(powercap / "intel-rapl:0", "package-0", energy_uj)
        assert meter.joules() == pytest.approx(joules)


def test_energy_is_spent_above_the_limit(powercap):
    budget = Budget(max_joules=0.5, meter=open_meter(powercap))
    assert not budget.is_spent()
    write(powercap / "intel-rapl:0", "package-0", 600_000)
    assert budget.is_spent()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("n/a\n")])
def test_a_meter_that_fails_later_says_so(powercap, damage):
    budget = Budget(max_joules=0.5, meter=open_meter(powercap))
    damage(powercap / "intel-rapl:0" / "energy_uj")
    with pytest.raises(HostError, match=r"meter cannot be read any more .*: leave out --max-joules"):
        budget.is_spent()


def test_a_machine_without_a_meter_says_so(tmp_path):
    with pytest.raises(HostError, match=r"no energy meter .* --max-joules cannot be kept: leave it out"):
        open_meter(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_meter_that_may_not_be_read_says_so(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").chmod(0)
    with pytest.raises(HostError, match=r"the energy meter cannot be read .* let this user read it"):
        open_meter(powercap)
