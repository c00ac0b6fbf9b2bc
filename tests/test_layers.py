"""The packages stand in one order: each imports only from packages above it, and keeps to its job."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "lazyjax"

# From the ground up; inside a package, modules import from each other freely.
PACKAGES = [
    "_core", "losses", "difference", "models", "kernels", "flow", "laziness",
    "theory", "training", "report", "data", "plot", "experiments", "cli",
]  # fmt: skip
# What else stands next to them.
DOORS = {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}
# Modules, or packages with all of theirs, that may write files.
WRITERS = ("cli", "report", "training.checkpoint", "_core.files", "_core.lock")

WRITES = {
    "dump", "mkdir", "rename", "replace", "save", "savefig", "savetxt", "savez", "savez_compressed",
    "to_csv", "to_json", "to_netcdf", "to_zarr", "tofile", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
# `x.replace(...)` and `x.save()` are names of harmless methods too; only these modules' own are files.
AMBIGUOUS = {"replace": {"os"}, "rename": {"os"}, "dump": {"json", "pickle"}, "save": {"np", "jnp", "numpy"}}


@cache
def files() -> list[tuple[str, ast.Module]]:
    """Return the dotted name inside lazyjax, and the program, of every file of a package."""
    paths = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.glob("*/**/*.py"))}
    return [(name, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))) for name, path in paths.items()]


def imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the full dotted name of all imports, those inside functions and type-checking blocks too."""
    package = ["lazyjax", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def own_imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of the imports from lazyjax, the name without `lazyjax.`."""
    for line, target in imports(name, tree):
        if target.partition(".")[0] == "lazyjax":
            yield line, target.removeprefix("lazyjax").removeprefix(".")


def is_module(dotted: str) -> bool:
    """Whether a name inside lazyjax is a file, or a package inside a package."""
    path = SRC.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or ("." in dotted and (path / "__init__.py").is_file())


def test_every_entry_is_a_package_in_its_place():
    entries = {path.name for path in SRC.iterdir() if path.name != "__pycache__"}
    assert entries - DOORS == set(PACKAGES), "PACKAGES is the order in which the story is told"
    assert len(entries) <= 18


def test_packages_import_only_from_packages_above():
    offenders = []
    for name, tree in files():
        here = PACKAGES.index(name.partition(".")[0])
        for line, target in own_imports(name, tree):
            there = target.partition(".")[0]
            if there not in PACKAGES:
                offenders.append(f"{name}:{line} imports lazyjax.{target}: import from the module that defines it")
            elif PACKAGES.index(there) > here:
                offenders.append(f"{name}:{line} imports {there}, which is below it")
            elif name.endswith("__init__") and there != PACKAGES[here]:
                offenders.append(f"{name}:{line} re-exports names of {there}")
            elif not (name.endswith("__init__") or is_module(target) or is_module(target.rpartition(".")[0])):
                offenders.append(f"{name}:{line} imports lazyjax.{target} from a package, not from its module")
    assert not offenders, "\n".join(offenders)


def test_only_public_jax_is_used():
    private = re.compile(r"\bjax\._src\b|\bjax\.interpreters\b|\bjax\.core\.(?!Tracer\b)")
    offenders = [
        f"{path.relative_to(SRC)}:{line}"
        for path in sorted(SRC.rglob("*.py"))
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(text)
    ]
    assert not offenders, "\n".join(offenders)


def test_only_plot_and_experiments_import_matplotlib_inside_functions():
    offenders = []
    for name, tree in files():
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(function)
            for node in ast.walk(function)
        }
        drawn = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and loads_matplotlib(name, n)]
        may_draw = name.partition(".")[0] in ("plot", "experiments")
        offenders += [f"{name}:{node.lineno}" for node in drawn if not (may_draw and id(node) in inside)]
    assert not offenders, "\n".join(offenders)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def loads_matplotlib(name: str, node: ast.AST) -> bool:
    return any(target.partition(".")[0] == "matplotlib" for _, target in imports(name, node))


def test_only_the_command_prints():
    offenders = [
        f"{name}:{node.lineno}"
        for name, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not name.startswith("cli.")
    ]
    assert not offenders, "\n".join(offenders)


def test_only_the_command_touches_the_configuration_of_jax():
    offenders = []
    for name, tree in files():
        lines = [line for line, target in imports(name, tree) if target.startswith("jax.config")]
        lines += [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_jax_config(node)]
        offenders += [f"{name}:{line}" for line in lines if not name.startswith("cli.")]
    assert not offenders, "\n".join(offenders)


def is_jax_config(node: ast.Attribute) -> bool:
    return node.attr == "config" and isinstance(node.value, ast.Name) and node.value.id == "jax"


def test_only_the_command_reports_and_checkpoints_write_files():
    offenders = [
        f"{name}:{node.lineno}"
        for name, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and writes_a_file(node)
        if not f"{name}.".startswith(tuple(f"{writer}." for writer in WRITERS))
    ]
    assert not offenders, "\n".join(offenders)


def writes_a_file(call: ast.Call) -> bool:
    """Whether a call looks like one that writes: `open` with a writing mode, or a method that does."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open":
        # open(path, mode), path.open(mode), gzip.open(path, mode)
        positional = call.args[1:2] if isinstance(call.func, ast.Name) else call.args[0:2]
        values = [*positional, *(k.value for k in call.keywords if k.arg == "mode")]
        modes = [set(v.value) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
        return any(mode <= set("rwxabt+") and mode & set("wxa+") for mode in modes)
    if not isinstance(call.func, ast.Attribute) or name not in WRITES:
        return False
    owner = getattr(call.func.value, "id", "")
    return name not in AMBIGUOUS or owner in AMBIGUOUS[name]


def test_the_detector_of_writes_sees_them():
    writing = [
        "open('a', 'w')", "open('a', mode='ab')", "path.open('x')", "path.write_text('a')", "json.dump(a, f)",
        "os.replace('a', 'b')", "dataset.to_netcdf('a')", "figure.savefig('a')", "jnp.save('a', b)",
    ]  # fmt: skip
    harmless = ["open('a')", "open('a', 'rb')", "text.replace('a', 'b')", "x.at[0].set(1)"]
    seen = [code for code in writing + harmless if writes_a_file(ast.parse(code, mode="eval").body)]
    assert seen == writing
