"""The house rules: imports without cycles, one step loop, size budgets, everything typed and documented."""

import ast
import sys
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import asgo

ROOT = Path(asgo.__file__).parent


@dataclass
class Module:
    path: Path

    @property
    def name(self):
        return ".".join(part for part in self.path.relative_to(ROOT).with_suffix("").parts if part != "__init__")

    @property
    def room(self):
        return self.name.split(".")[0]

    @cached_property
    def text(self):
        return self.path.read_text()

    @cached_property
    def tree(self):
        return ast.parse(self.text)

    @cached_property
    def functions(self):
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    @cached_property
    def typing_only(self):
        """Nodes under ``if TYPE_CHECKING``."""
        found = [n for n in ast.walk(self.tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        return {node for branch in found for node in ast.walk(branch)}

    def imports(self, within=None):
        """Dotted names, with those that are imported from a package of this library as its members."""
        for node in ast.walk(within or self.tree):
            if isinstance(node, ast.ImportFrom):
                inside = (node.module or "").split(".")[0] == "asgo"
                names = [f"{node.module}.{alias.name}" for alias in node.names] if inside else [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            yield from ((name, node in self.typing_only) for name in names)

    def internal(self, within=None):
        """Modules of this library that it imports when it runs."""
        for name, typing_only in self.imports(within):
            if name.split(".")[0] == "asgo" and not typing_only:
                yield known(name.removeprefix("asgo").removeprefix("."))


MODULES = [Module(path) for path in sorted(ROOT.rglob("*.py"))]
NAMES = {module.name for module in MODULES}
CORE = [module for module in MODULES if module.room != "lab"]


def known(name):
    """The module that a dotted name is, or is in."""
    while name not in NAMES:
        name = name.rpartition(".")[0]
    return name


def broken(modules, rule):
    """What breaks a rule, as one text for the report: ``module: what``."""
    return "\n".join(f"{module.name or 'asgo'}: {what}" for module in modules for what in rule(module))


def test_no_module_imports_itself_by_way_of_others():
    graph = {module.name: {name for name in module.internal() if name != module.name} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(name or "asgo" for name in reversed(error.args[1])))


def test_nothing_imports_the_laboratory_or_the_package_itself():
    def rule(module):
        yield from (f"imports {name}" for name in module.internal() if name.split(".")[0] == "lab")
        yield from ("imports the package" for name in module.internal() if name == "" != module.name)

    assert not broken(CORE, rule)


FLOORS = (
    ("_types",),
    ("linalg",),
    ("views", "structures"),
    ("parts", "state_keys"),
    ("distributed",),
    ("optimizer",),
    ("presets",),
    ("checkpoint", "diagnostics"),
    ("hosts",),
    ("lab",),
)
"""A room may import its own modules and rooms of floors below."""


def test_rooms_are_acyclic():
    level = {room: i for i, floor in enumerate(FLOORS) for room in floor}

    def rule(module):
        for name in module.internal():
            room = name.split(".")[0]
            if room in level and room != module.room:
                yield from [f"imports {name}"] if level[room] >= level[module.room] else []

    assert not broken([module for module in MODULES if module.room in level], rule)


def test_structures_know_matrices_alone():
    def rule(module):
        allowed = {"_types", "linalg", "structures"}
        yield from (f"imports {name}" for name in module.internal() if name.split(".")[0] not in allowed)

    assert not broken([module for module in CORE if module.room == "structures"], rule)


def test_a_step_on_one_process_passes_no_distributed_module():
    """Of the modules from a gradient to the weight, which only look up whether something is distributed."""
    walk = ("step", "bucket", "update_size", "rounding", "root_retry", "refresh_schedule")
    modules = [module for module in MODULES if module.name in ("parts", *(f"optimizer.{name}" for name in walk))]
    assert len(modules) == len(walk) + 1
    assert not broken(modules, lambda m: (f"imports {n}" for n in m.internal() if n.startswith("distributed")))


def test_no_public_function_hides_a_module():
    def rule(module):
        inside = {n.rpartition(".")[2] for n in NAMES if n.rpartition(".")[0] == module.name}
        defined = {node.name for node in module.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in module.tree.body:
            if isinstance(node, ast.ImportFrom):
                taken = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                defined |= {name for name, origin in taken.items() if origin.removeprefix("asgo.") not in NAMES}
        yield from (f"{name} is a module and a function" for name in inside & defined)

    assert not broken([module for module in MODULES if module.path.stem == "__init__"], rule)


def test_the_core_needs_torch_and_einops_alone():
    def rule(module):
        allowed = {"torch", "einops", "asgo", *sys.stdlib_module_names}
        for name, typing_only in module.imports():
            top = name.split(".")[0]
            if top not in allowed and not (typing_only and top == "jaxtyping"):
                yield f"imports {name}"

    assert not broken(CORE, rule)


def test_internal_imports_stand_at_the_top():
    def rule(module):
        return (f"{f.name} imports {name}" for f in module.functions for name in module.internal(f))

    assert not broken(MODULES, rule)


def test_no_module_of_the_core_has_the_name_of_one_of_the_standard_library():
    assert not [module.name for module in CORE if module.path.stem in sys.stdlib_module_names]


def body_lines(function):
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 1


def test_sizes():
    def rule(module):
        lines = len(module.text.splitlines())
        yield from [f"{lines} lines"] if lines > 400 else []
        yield from (f"{f.name} has {body_lines(f)} lines" for f in module.functions if body_lines(f) > 45)

    assert not broken(MODULES, rule)


def test_everything_is_typed_and_nothing_takes_kwargs():
    """Only what a training framework calls takes them: it passes the user's options as keywords."""

    def rule(module):
        for f in module.functions:
            args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            untyped = [arg.arg for arg in args if arg.annotation is None and arg.arg not in ("self", "cls")]
            kwargs = f.args.kwarg is not None and module.room != "hosts"
            if untyped or kwargs or (f.returns is None and f.name != "__init__"):
                yield f.name

    assert not broken(MODULES, rule)


def test_no_assert_and_only_the_laboratory_prints():
    def rule(module):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assert):
                yield f"line {node.lineno}: assert is not for users"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and module.room != "lab":
                yield f"line {node.lineno} prints"

    assert not broken(MODULES, rule)


def test_one_step_loop():
    """SPAM wraps an optimizer, so it has the method; it is a call of the step of the one inside."""
    loops = {module.path.stem: f for module in CORE for f in module.functions if f.name == "step"}
    wrapper = loops.pop("spam")
    assert list(loops) == ["step"]
    assert ast.unparse(wrapper.body[1:]) == "return self.optimizer.step(closure)"


def test_constructors_are_short():
    """Nine hyperparameters and where the update's size comes from; the keyword arguments say how, not what."""
    execution = {
        "self",
        "params",
        "root",
        "maximize",
        "capturable",
        "packed_state",
        "max_size",
        "rounding",
        "adamw",
        "precision",
    }
    for module in CORE:
        for f in module.functions if module.room == "presets" else ():
            if f.name == "__init__":
                names = [arg.arg for arg in [*f.args.args, *f.args.kwonlyargs] if arg.arg not in execution]
                assert len(names) <= 10, module.name


def test_every_public_name_is_documented():
    for name in asgo.__all__:
        assert getattr(asgo, name).__doc__, name
