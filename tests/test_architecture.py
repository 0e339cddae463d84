"""The house rules: imports run downhill, one step loop, size budgets, everything typed and documented."""

import ast
import re
import statistics
import sys
from pathlib import Path

import pytest

import asgo

ROOT = Path(asgo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CORE = [path for path in FILES if "lab" not in path.relative_to(ROOT).parts]
FLOORS = [
    {"_types"},
    {"views", "partition", "masks", "matmul", "scaling", "triangles"},
    {"minimax", "eigen", "powers", "roots"},
    {"adamw"},
    {"structures", *(f"structures.{path.stem}" for path in (ROOT / "structures").glob("[!_]*.py"))},
    {"ladder"},
    {"buckets", "settings", "state", *(f"distributed.{path.stem}" for path in (ROOT / "distributed").glob("[!_]*.py"))},
    {"optimizer", "sites", "attention", "gated", "labels", "routing"},
    {
        "presets",
        *(f"presets.{path.stem}" for path in (ROOT / "presets").glob("[!_]*.py")),
        "report",
        "checkpoint",
        "folders",
    },
    {"diagnostics", *(f"diagnostics.{path.stem}" for path in (ROOT / "diagnostics").glob("[!_]*.py")), "advise"},
    {""},
]
"""From the ground up. A module imports only from floors below, or from its own floor."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor(module):
    return next(i for i, names in enumerate(FLOORS) if module in names)


def tree(path):
    return ast.parse(path.read_text())


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function):
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 1


def imports(node_or_tree):
    for node in ast.walk(node_or_tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module in ("asgo", "asgo.structures"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def internal(name):
    """The module within the package that an import names, None for others."""
    if name != "asgo" and not name.startswith("asgo."):
        return None
    module = name.removeprefix("asgo").removeprefix(".")
    known = {module_name(path) for path in FILES}
    while module not in known:
        module = module.rpartition(".")[0]
    return module


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_imports_run_downhill(path):
    own = module_name(path)
    for name in imports(tree(path)):
        module = internal(name)
        if module is not None and own != "structures":
            assert module.split(".")[0] != "lab", f"{own} imports the laboratory"
            assert floor(module) <= floor(own), f"{own} imports {module} from above"
            assert module != "" or own == "", f"{own} imports the package itself"


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_needs_torch_and_einops_alone(path):
    allowed = {"torch", "einops", "asgo", *sys.stdlib_module_names}
    typing_only = {
        name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for name in imports(node)
    }
    for name in imports(tree(path)):
        assert name.split(".")[0] in allowed or (name in typing_only and name == "jaxtyping"), name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_internal_imports_stand_at_the_top(path):
    for function in functions(path):
        assert not [name for name in imports(function) if internal(name) is not None], function.name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path):
    assert len(path.read_text().splitlines()) <= 400
    for function in functions(path):
        assert body_lines(function) <= 45, f"{function.name} has {body_lines(function)} lines"


def test_the_median_function_is_short():
    assert statistics.median(body_lines(f) for path in CORE for f in functions(path)) <= 8


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_everything_is_typed_and_nothing_takes_kwargs(path):
    for function in functions(path):
        args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [arg.arg for arg in args if arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not untyped, f"{function.name}: {untyped}"
        assert function.args.kwarg is None, function.name
        assert function.returns is not None or function.name == "__init__", function.name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_assert_and_only_the_laboratory_prints(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert is not for users"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert "lab" in path.relative_to(ROOT).parts


def test_one_step_loop():
    """SPAM wraps an optimizer, so it has a step; it leaves parameters to the one inside."""
    loops = {path.name: path for path in CORE for f in functions(path) if f.name == "step"}
    assert set(loops) == {"optimizer.py", "spam.py"}
    wrapper = loops["spam.py"].read_text()
    assert wrapper.count("self.optimizer.step()") == 1
    assert not re.search(r"param\.\w+_\(|_foreach", wrapper)


def test_constructors_are_short():
    """Nine hyperparameters and where the update's size comes from; the keyword arguments say how, not what."""
    execution = {"self", "params", "root", "maximize", "capturable", "packed_state"}
    for node in (node for path in (ROOT / "presets").glob("*.py") for node in ast.walk(tree(path))):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names = [arg.arg for arg in [*node.args.args, *node.args.kwonlyargs] if arg.arg not in execution]
            assert len(names) <= 10


def test_every_public_name_is_documented():
    for name in asgo.__all__:
        assert getattr(asgo, name).__doc__, name
