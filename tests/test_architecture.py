"""Imports run downwards: the floors of docs/architecture.md, read from the source with ast."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "python/ekfac_rs"
# From the ground up, each with its modules and packages; a module may import those of its own
# floor, as long as nothing goes round in a circle, and everything below. The package's __init__
# stands on all of them, and the laboratory on that.
FLOORS = {
    "ground": (
        *("errors", "_core", "_tensors", "_checks", "_cuda", "_files", "_lanczos", "_modes"),
        *("_packages", "_pictures", "_ranks"),
    ),
    "loaders": ("loading", "_checkpoints"),
    "layers": ("layers",),
    "losses": ("likelihood",),
    "BatchNorm": ("batchnorm",),
    "blocks": (
        *("curvature.settings", "curvature.block", "curvature.kronecker", "curvature.columnwise"),
        *("curvature.diagonal", "curvature.files", "curvature.curvature", "curvature.accumulators"),
        *("curvature.eigenbasis", "curvature.corrections", "curvature.conjugate"),
        *("curvature.thin", "curvature.bounding", "curvature.spectra"),
    ),
    "passes": ("curvature.recovery", "curvature.passes", "curvature"),
    "on top": (
        *("_operators", "penalty", "stability", "metrics", "description", "scales", "info"),
        "distributed",
    ),
    "learner": ("learning",),
    "library": ("",),
    "guests": ("integrations",),
    "laboratory": ("experiments",),
}
PUBLIC = {"", "errors", "info", "metrics", "likelihood", "scales"}


def modules(folder):
    """Name below ekfac_rs to source, of every module there."""
    files = [*folder.rglob("*.py"), *folder.rglob("*.pyi")]
    names = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in files}
    return {
        name.removesuffix("__init__").removesuffix("."): path.read_text(encoding="utf-8")
        for path, name in names.items()
    }


def imports(name, sources):
    """Names of the modules of ekfac_rs that one imports, anywhere in its code."""
    found = set()
    for node in _parsed(sources[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            for alias in node.names:
                # A name may be a module or be in one.
                inner = f"{node.module}.{alias.name}"
                found.add(inner if _below(inner) in sources else node.module)
    return {_below(module) for module in found if module.split(".")[0] == "ekfac_rs"} - {name}


@cache
def _parsed(source):
    """Every import; most sources are read over and over, with one that was changed."""
    return tuple(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


def _below(module):
    return module.removeprefix("ekfac_rs").removeprefix(".")


def floor_of(name):
    """Number of the floor, of the longest prefix that the table names; None if there is none."""
    numbers = {prefix: number for number, names in enumerate(FLOORS.values()) for prefix in names}
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((numbers[prefix] for prefix in prefixes if prefix in numbers), None)


def faults(sources):
    """Say what is wrong with the imports of these modules."""
    graph = {name: imports(name, sources) for name in sources}
    said = [f"{name}: on no floor" for name in sources if floor_of(name) is None]
    for name, imported in graph.items():
        said += [
            f"{name} imports {other} of a floor above it"
            for other in imported
            if None not in (floor_of(name), floor_of(other)) and floor_of(other) > floor_of(name)
        ]
        if name.startswith("experiments"):
            said += [
                f"{name} imports {other}, which is not public"
                for other in imported
                if not other.startswith("experiments") and other not in PUBLIC
            ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        said.append(f"circle: {' <- '.join(error.args[1])}")
    return said


@pytest.fixture(scope="module")
def library():
    return modules(LIBRARY)


def test_imports_run_downwards_and_never_in_a_circle(library):
    assert len(library) > 40
    assert faults(library) == []


def test_every_floor_is_inhabited(library):
    for names in FLOORS.values():
        for prefix in names:
            assert any(name == prefix or name.startswith(f"{prefix}.") for name in library), prefix


def test_the_document_names_every_inhabitant():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for prefix in (name for names in FLOORS.values() for name in names if name):
        last = prefix.rpartition(".")[2]
        assert any(words in text for words in (f"`{last}`", f"/{last}`", f"`{last}/")), prefix


@pytest.mark.parametrize(
    ("module", "line", "named"),
    [
        ("errors", "import ekfac_rs.learning", "errors imports learning of a floor above"),
        ("layers.linear", "from ekfac_rs import likelihood", "layers.linear imports likelihood"),
        ("curvature.files", "from ekfac_rs.curvature.passes import x", "imports curvature.passes"),
        ("curvature.settings", "from ekfac_rs.curvature.curvature import x", "circle: "),
        ("layers.base", "from ekfac_rs.layers.finding import x", "circle: "),
        ("learning", "def f():\n    import ekfac_rs", "learning imports  of a floor above"),
        ("penalty", "from ekfac_rs.experiments import runs", "imports experiments.runs of a floor"),
        ("experiments.runs", "from ekfac_rs._checks import x", "_checks, which is not public"),
        ("experiments.runs", "from ekfac_rs.layers import x", "layers, which is not public"),
        ("experiments.data.idx", "import ekfac_rs.learning", "learning, which is not public"),
        ("experiments.pictures", "from ekfac_rs.experiments import report", "circle: "),
        ("cellar", "", "cellar: on no floor"),
    ],
)
def test_an_import_that_goes_up_or_round_is_named(library, module, line, named):
    changed = {**library, module: f"{library.get(module, '')}\n{line}\n"}
    assert any(named in fault for fault in faults(changed))
