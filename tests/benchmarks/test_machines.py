"""The script that runs the suites as on other machines: what a row sets, counts and records."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "machines.py"
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="good" /><testcase classname="tests.test_a" name="also[1]" />
<testcase classname="tests.test_a" name="bad[x]"><failure message="no" /></testcase>
<testcase classname="tests.test_b" name="broken"><error message="no" /></testcase>
<testcase classname="tests.test_b" name="gpu"><skipped message="no" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def machines(monkeypatch):
    spec = importlib.util.spec_from_file_location("machines", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "machines", module)
    spec.loader.exec_module(module)
    return module


def test_a_row_has_its_settings_and_those_of_no_other(machines, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for row in machines.ROWS.values():
        env = machines.environment(row)
        found = {key: env.get(key) for other in machines.ROWS.values() for key in other}
        assert found == {**dict.fromkeys(found), "OMP_NUM_THREADS": "1", **row}
        assert env["PYTHONPATH"].startswith(str(PATH.parent.parent / "src"))


def test_failures_errors_and_skips_are_counted_apart(machines, tmp_path):
    (tmp_path / "report.xml").write_text(JUNIT)
    assert machines.counted(tmp_path / "report.xml") == (2, ["test_a::bad[x]", "test_b::broken"], 1)


def test_every_suite_is_a_file(machines):
    assert all(len(list(Path(__file__).parents[1].rglob(f"test_{suite}.py"))) == 1 for suite in machines.SUITES)


def test_a_record_keeps_the_rows_of_other_runs_and_replaces_its_own(machines, tmp_path):
    def row(name, torch, failures=()):
        failures = list(failures)
        return machines.Row(name, "-", torch, "AVX2", 5, len(failures), 1, 2.0, failures)

    machines.write(tmp_path, [row("as it is", "2.13.0", ["test_a::bad"]), row("two threads", "2.13.0")], ["roots"])
    machines.write(tmp_path, [row("as it is", "2.14.1"), row("as it is", "2.13.0")], ["roots"])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(each["name"], each["torch"], each["failed"]) for each in rows] == [
        ("two threads", "2.13.0", 0),
        ("as it is", "2.14.1", 0),
        ("as it is", "2.13.0", 0),
    ]
    assert "| as it is | `-` | 2.14.1 | AVX2 | 5 | 0 | 1 |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_row_runs_the_suites_with_its_settings(machines):
    row = machines.run("MKL without vectors", sys.executable, ["minimax"], ["-k", "impossible", "-q"])
    assert row.set == "MKL_CBWR=COMPATIBLE"
    assert row.passed > 0
    assert row.failures == []
