"""The map of the modules holds: a file imports only from files above it, and keeps to its job."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "lazyjax"

# The map, from the ground up. A private file stands just before its owner.
ORDER = [
    "_types",
    "_check",
    "model",
    "_convolution",
    "networks",
    "maps",
    "_root",
    "loss",
    "_user_loss",
    "_program",
    "_difference_pair",
    "_difference_linear",
    "_difference_smooth",
    "_difference_piecewise",
    "_difference_window",
    "_difference_control",
    "difference",
    "_krylov",
    "tangent",
    "_rules",
    "_entries",
    "_factors",
    "_products",
    "_plan",
    "_blocks",
    "_samples",
    "kernel",
    "_spectrum",
    "closed_form",
    "arccos",
    "population",
    "phi",
    "_cost",
    "_anchored",
    "linear_part",
    "_field",
    "regression",
    "_scheme",
    "exponential",
    "result",
    "_collapse",
    "_integrate",
    "_choice",
    "flow",
    "descent",
    "criterion",
    "_hessian",
    "_path",
    "step",
    "_squares",
    "_curvature",
    "_kinks",
    "_neurons",
    "curvature",
    "_ball_constants",
    "lipschitz",
    "correction",
    "_bounds_numbers",
    "_bounds_horizon",
    "_bounds_uniform",
    "_bounds_rank",
    "_bounds_lecture",
    "_bounds_scale",
    "bounds",
    "_facts",
    "_claims",
    "_theorems",
    "certificate",
    "_instances",
    "_trials",
    "_counterexamples",
    "verify",
    "_task",
    "augment",
    "schedule",
    "_train_step",
    "_train_checks",
    "_train_chunks",
    "_checkpoint",
    "_train_run",
    "training",
    "track",
    "sweep",
    "_lanes",
    "_prediction",
    "_summary",
    "report",
    "data",
    "_image_files",
    "images",
    "experiments",
    "_plot_axes",
    "_plot_kernel",
    "_plot_panels",
    "_plot_deep",
    "_plot_rates",
    "_plot_student",
    "_plot_trajectories",
    "plot",
    "_html",
    "_user",
    "_output",
    "_quiet",
    "_reproduce",
    "cli",
]
# The doors of the package: they may import anything, and nothing imports them.
DOORS = ["__init__", "__main__"]

WRITES = {
    "dump", "mkdir", "rename", "replace", "save", "savefig", "savetxt", "savez", "savez_compressed",
    "to_csv", "to_json", "to_netcdf", "to_zarr", "tofile", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
# `x.replace(...)` and `x.save()` are names of harmless methods too; only these modules' own are files.
AMBIGUOUS = {"replace": {"os"}, "rename": {"os"}, "dump": {"json", "pickle"}, "save": {"np", "jnp", "numpy"}}


def files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def module_of(path: Path) -> str:
    """The name on the map of a file: of its folder, for a file in a subpackage."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path, tree: ast.Module) -> list[str]:
    """Full dotted names of all imports of a file, those inside functions and type-checking blocks too."""
    package = ["lazyjax", *path.relative_to(SRC).parent.parts]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SRC)))
class TestEveryFile:
    def test_is_on_the_map(self, path):
        assert module_of(path) in ORDER + DOORS, f"place {path.name} in ORDER, where the story has it"

    def test_imports_only_from_above(self, path):
        here = module_of(path)
        if here in DOORS:
            return
        for name in imported(path, parse(path)):
            root, _, rest = name.partition(".")
            if root != "lazyjax":
                continue
            there = rest.partition(".")[0]
            assert there in ORDER, f"{path.name} imports {name}: import from the module that defines it"
            inside = there == here == "experiments"
            assert inside or ORDER.index(there) < ORDER.index(here), f"{here} imports {there}, which is below it"

    def test_uses_public_jax_only(self, path):
        assert "jax._src" not in path.read_text(encoding="utf-8")

    def test_only_plot_imports_matplotlib(self, path):
        roots = {name.partition(".")[0] for name in imported(path, parse(path))}
        assert module_of(path) == "plot" or "matplotlib" not in roots

    def test_only_cli_prints(self, path):
        calls = (node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
        printed = [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]
        assert module_of(path) == "cli" or not printed, f"print in lines {printed}"

    def test_only_cli_touches_the_configuration_of_jax(self, path):
        tree = parse(path)
        touched = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "config"
            and isinstance(node.value, ast.Name)
            and node.value.id == "jax"
        ]
        imports = [name for name in imported(path, tree) if name.startswith("jax.config")]
        assert module_of(path) == "cli" or not (touched or imports), f"jax.config in lines {touched}"

    def test_only_cli_sweeps_reports_and_checkpoints_write_files(self, path):
        writes = [node.lineno for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and writes_a_file(node)]
        writers = {"cli", "sweep", "report", "_checkpoint"}
        assert module_of(path) in writers or not writes, f"files written in lines {writes}"


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


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open('a', 'w')", True),
        ("open('a', mode='ab')", True),
        ("path.open('x')", True),
        ("open('a')", False),
        ("open('a', 'rb')", False),
        ("path.write_text('a')", True),
        ("json.dump(a, f)", True),
        ("text.replace('a', 'b')", False),
        ("os.replace('a', 'b')", True),
        ("dataset.to_netcdf('a')", True),
        ("figure.savefig('a')", True),
        ("jnp.save('a', b)", True),
        ("x.at[0].set(1)", False),
    ],
)
def test_the_detector_of_writes_sees_them(code, expected):
    assert writes_a_file(ast.parse(code, mode="eval").body) is expected
