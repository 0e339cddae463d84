"""Runs example scripts of training frameworks, written by their makers, with asgo switched on in at most three lines.

    python -m benchmarks.hosts --out runs/hosts   # all, each in a virtual environment of its own
    python -m benchmarks.hosts --only trl --python venv/bin/python --out runs/hosts  # in one that exists
    python -m benchmarks.hosts --only timm peft --sources clones/ --out runs/hosts  # of clones that exist

A script is taken as it is from the installed package or from the makers' repository at a tag or a commit. At most three
of its lines are changed, and it trains a small model on data made here: all steps at once, then from the checkpoint in
the middle. ``results.json`` and ``table.md`` say what came of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.hosts.examples import EXAMPLES, Example

HERE = Path(__file__).parents[2]


def environment(example: Example, folder: Path) -> Path:
    """A virtual environment with asgo and the example's packages; its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    for some in ("torch==2.13.0", str(HERE), *example.packages):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", some], check=True)
    return python


def source(example: Example, python: Path, sources: Path | None, folder: Path) -> str:
    """The text of the makers' script."""
    if example.repository is None:
        find = f"import importlib.util as u; print(u.find_spec({example.module!r}).origin)"
        answer = subprocess.run([str(python), "-c", find], capture_output=True, text=True, check=True)
        return Path(answer.stdout.strip()).read_text()
    clone = (sources or folder) / example.repository.rpartition("/")[2]
    if not clone.exists():
        git, address = ["git", "-C", str(clone)], f"https://github.com/{example.repository}"
        subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
        subprocess.run([*git, "fetch", "--quiet", "--depth", "1", address, example.tag], check=True)
        subprocess.run([*git, "checkout", "--quiet", "FETCH_HEAD"], check=True)
    return (clone / example.path).read_text()


def changed(example: Example, text: str) -> str:
    """The script with asgo switched on."""
    if len(example.changes) > 3:
        raise ValueError(f"{example.name}: {len(example.changes)} lines are changed")
    for old, new in example.changes:
        if not text.count(old + "\n") or new.count("\n"):
            raise ValueError(f"{example.name}: the script has no line {old!r}")
        text = text.replace(old + "\n", new + "\n", 1)
    return text


def run(command: list[str], folder: Path, log: Path) -> bool:
    paths = os.pathsep.join([str(HERE / "src"), str(folder)])
    settings = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        ended = subprocess.run(
            command, cwd=folder, env={**os.environ, **settings}, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    return ended.returncode == 0


def tried(example: Example, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train at once, then from the middle; what came of it."""
    python = options.python.absolute() if options.python else environment(example, folder)
    (folder / "script.py").write_text(changed(example, source(example, python, options.sources, folder)))
    (folder / "prepare.py").write_text(example.prepare)
    start, logs = time.time(), options.out / example.name
    logs.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, object] = {"name": example.name, "lines changed": len(example.changes)}
    outcome["prepared"] = run([str(python), "prepare.py"], folder, logs / "prepare.log")
    for what, words in (("trains", example.whole), ("resumes", example.resumed)):
        outcome[what] = run([str(python), *words], folder, logs / f"{what}.log")
    outcome["same weights"] = run([str(python), "-c", example.same], folder, logs / "same.log")
    text = (logs / "trains.log").read_text()
    outcome["says what goes where"] = all(word in text for word in example.said)
    return {**outcome, "seconds": round(time.time() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--python", type=Path, help="of an environment with the packages")
    parser.add_argument("--sources", type=Path, help="a folder of clones of the makers' repositories")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(EXAMPLES[name], options, Path(folder)))
        print(rows[-1], flush=True)
    (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    columns = list(rows[0])
    lines = [" | ".join(columns), "|".join("---" for _ in columns)]
    lines += [" | ".join({True: "yes", False: "no"}.get(row[c], str(row[c])) for c in columns) for row in rows]  # pyright: ignore[reportArgumentType, reportCallIssue]
    (options.out / "table.md").write_text("".join(f"| {line} |\n" for line in lines))


if __name__ == "__main__":
    main()
