"""The suites of the core on every processor that this machine can stand for, and with other builds of torch.

    python benchmarks/machines.py
    python benchmarks/machines.py --python ~/torch-2.14.1/bin/python --rows "as it is"
    make test-machines

Each row sets what torch, oneDNN and MKL read at their start, and runs pytest in a process of its own, one row after
another. It prints one table and writes it to the folder of `--out`, if that is given. The exit status is 1 if any test
failed. An interpreter given needs torch, einops, pytest, hypothesis, jaxtyping and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
ROWS: dict[str, dict[str, str]] = {
    "as it is": {},
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "ATen without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATen with AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL without vectors": {"MKL_CBWR": "COMPATIBLE"},
}
"""What is set; all other rows have one thread."""
SUITES = (
    *("roots", "minimax", "structures", "packed", "family", "asgo", "optimizer", "step"),
    *("square_root", "waking", "rounding", "contract"),
)
"""Of linear algebra, structures, presets, the optimizer and its step."""
FACTS = """
import json, torch
print(json.dumps({"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}))
"""


@dataclass
class Row:
    """What one run found."""

    name: str
    set: str
    torch: str
    capability: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: list[str]


def environment(row: dict[str, str]) -> dict[str, str]:
    """Of the process of a row: none of the settings of others."""
    known = {key for other in ROWS.values() for key in other}
    inherited = {key: value for key, value in os.environ.items() if key not in known}
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **row}


def run(name: str, python: str, suites: list[str], extra: list[str]) -> Row:
    """Run the suites in one row."""
    env = environment(ROWS[name])
    facts = json.loads(subprocess.run([python, "-c", FACTS], env=env, check=True, capture_output=True).stdout)
    files = [str(next((ROOT / "tests").rglob(f"test_{suite}.py"))) for suite in suites]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", *files, f"--junitxml={report}", "--tb=short", "-p", "no:cacheprovider"]
        subprocess.run([*command, *extra], cwd=ROOT, env=env, check=False)
        passed, failures, skipped = counted(report)
    settings = " ".join(f"{key}={value}" for key, value in ROWS[name].items()) or "-"
    seconds = round(time.perf_counter() - start, 1)
    return Row(name, settings, **facts, passed=passed, failed=len(failures), skipped=skipped, seconds=seconds,
               failures=failures)  # fmt: skip


def counted(report: Path) -> tuple[int, list[str], int]:
    """Tests that passed, the names of those that did not, and how many were skipped."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}" for case in failed]
    return len(cases) - len(failed) - skipped, names, skipped


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| row | set | torch | ATen says | passed | failed | skipped |",
        "|---|---|---|---|---:|---:|---:|",
        *(
            f"| {row.name} | `{row.set}` | {row.torch} | {row.capability} "
            f"| {row.passed} | {row.failed} | {row.skipped} |"
            for row in rows
        ),
    ]
    failures = [f"- {row.name}, torch {row.torch}: `{name}`" for row in rows for name in row.failures]
    return "\n".join([*lines, *([""] if failures else []), *failures]) + "\n"


def processor() -> str:
    """Its name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else "unknown"


def write(folder: Path, rows: list[Row], suites: list[str]) -> None:
    """The table, and all of it as data; rows of another run of the same name and torch are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    kept = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    new = {(row.name, row.torch) for row in rows}
    rows = [*(row for row in kept if (row.name, row.torch) not in new), *rows]
    record = {"processor": processor(), "suites": suites, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(f"{processor()}, tests of {', '.join(suites)}\n\n{table(rows)}")


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES), metavar="SUITE",
                        help=", ".join(SUITES))  # fmt: skip
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PATH",
                        help="interpreters with another torch; this one if none is given")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--pytest", default="", help="more arguments of pytest, as one string")
    args = parser.parse_args()
    rows = [run(name, python, args.suites, args.pytest.split()) for python in args.python for name in args.rows]
    print(table(rows))
    if args.out:
        write(args.out, rows, args.suites)
    return int(any(row.failed or not row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
