"""The rules that keep the package liveable, read off its syntax trees."""

import ast
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

import scenefit

ROOT = Path(scenefit.__file__).parent

# Folders from left to right, and the modules of each in the order in which they may import one another.
ORDER = {
    "arrays": [
        "box",
        "compilation",
        "progress",
        "peaks",
        "linear",
        "vecchia",
        "fourier",
        "stamps",
        "starlet",
        "profiles",
    ],
    "sky": ["units", "psf", "resampledpsf", "mixture", "frame"],
    "data": [
        "weights",
        "nuisances",
        "abstractnoise",
        "noise",
        "correlation",
        "blanksky",
        "correlated",
        "sampling",
        "renderer",
        "resample",
        "observation",
        "resampled",
    ],
    "model": ["parameters", "link", "spectrum", "morphology", "clumpy", "starlet", "source", "packing", "scene"],
    "infer": [
        "problem",
        "matched",
        "posterior",
        "inverse",
        "quadratic",
        "descent",
        "slopes",
        "gradient",
        "footprints",
        "information",
        "pointing",
        "templates",
        "fluxes",
        "dense",
        "solvers",
        "fit",
        "rings",
        "truncated",
        "linear",
        "batch",
        "jacobian",
        "laplace",
        "errors",
        "target",
        "diagnostics",
        "chains",
        "guides",
        "sample",
    ],
    "survey": [
        "envelopes",
        "flags",
        "columns",
        "measure",
        "sensitivity",
        "skyshapes",
        "ellipses",
        "parts",
        "radii",
        "profile",
        "average",
        "priors",
        "deblend",
        "footprint",
        "stars",
        "modelerror",
        "catalog",
        "forced",
        "clumps",
        "families",
        "significance",
        "candidates",
        "subtraction",
        "detections",
        "listed",
        "outliers",
        "search",
        "detect",
        "initialize",
        "validate",
        "inject",
    ],
    "app": [
        "fitsfile",
        "color",
        "panels",
        "profileplot",
        "validationplot",
        "plot",
        "serialization",
        "tablefile",
        "io",
        "datasets",
        "config",
        "pipeline",
        "comparison",
        "results",
        "report",
        "cli",
    ],
}
RANK = {f"{folder}.{name}": n for n, (folder, name) in enumerate((f, m) for f, ms in ORDER.items() for m in ms)}
APP_ONLY = {"matplotlib", "huggingface_hub", "asdf", "typer"}
MAX_LINES = 500

PATHS = sorted(ROOT.rglob("*.py"))
MODULES = [path for path in PATHS if path.name not in ("__init__.py", "__main__.py")]


def dotted(path: Path) -> str:
    """Name of a module inside the package, such as "sky.frame"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.AST, folder: str) -> list[str]:
    """Absolute names of the modules that a statement may import; "" for anything but an import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        above = ["scenefit", folder][: 3 - node.level]
        base = ".".join([*above, base] if base else above)
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


@dataclass
class Class:
    """What the rules need to know of a class of the package."""

    name: str
    module: str
    bases: list[str]
    is_public: bool
    has_docstring: bool
    abstract: set[str] = field(default_factory=set)
    concrete: dict[str, bool] = field(default_factory=dict)
    """Names of its own members: methods with a body, and whether each has a docstring; fields (True)."""


def name_of(node: ast.expr) -> str:
    """Last part of a dotted name: "Module" of `eqx.Module`."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def read_class(node: ast.ClassDef, module: str) -> Class:
    bases = [name_of(base) for base in node.bases]
    cls = Class(node.name, module, bases, not node.name.startswith("_"), ast.get_docstring(node) is not None)
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            if any(name_of(d).startswith("abstract") for d in item.decorator_list):
                cls.abstract.add(item.name)
            else:
                cls.concrete[item.name] = ast.get_docstring(item) is not None
        elif isinstance(item, ast.AnnAssign):
            kind = name_of(item.annotation)
            # A class variable without a value is one that every final class must give.
            if kind in ("AbstractVar", "AbstractClassVar") or (kind == "ClassVar" and item.value is None):
                cls.abstract.add(item.target.id)
            else:
                cls.concrete[item.target.id] = True
        elif isinstance(item, ast.Assign):
            cls.concrete.update({target.id: True for target in item.targets})
    return cls


CLASSES = {
    cls.name: cls
    for path in MODULES
    for cls in (read_class(node, dotted(path)) for node in tree(path).body if isinstance(node, ast.ClassDef))
}


def ancestors(cls: Class) -> list[Class]:
    """Base classes inside the package, nearest first."""
    found = []
    for base in cls.bases:
        if base in CLASSES:
            found += [CLASSES[base], *ancestors(CLASSES[base])]
    return found


def unimplemented(cls: Class) -> set[str]:
    """Abstract members that a class still lacks."""
    missing = set()
    for base in reversed([cls, *ancestors(cls)]):
        missing = (missing | base.abstract) - base.concrete.keys()
    return missing


def offenders(path: Path, is_bad) -> list[str]:
    """Places in a file where a node is bad."""
    return [f"{dotted(path)}:{node.lineno}" for node in ast.walk(tree(path)) if is_bad(node)]


def test_every_module_has_its_place():
    assert MODULES
    assert {dotted(path) for path in MODULES} - RANK.keys() == set()


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_one_way(path):
    own = dotted(path)
    bad = set()
    for node in ast.walk(tree(path)):
        for name in imported(node, own.split(".")[0]):
            parts = name.split(".")
            if parts[0] != "scenefit" or len(parts) < 3:
                continue
            other = ".".join(parts[1:3])
            # A folder's own name is no module; it says nothing of order.
            if other in RANK and RANK[other] >= RANK[own]:
                bad.add(other)
    assert bad == set(), f"{own} imports what stands to its right"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_only_whole_modules_of_the_package_are_imported(path):
    """`import scenefit` or `from scenefit import x` would go through the top `__init__`, which imports everything."""

    def is_bad(node):
        names = imported(node, dotted(path).split(".")[0])
        return any(
            name == "scenefit" or (name.startswith("scenefit.") and name.split(".")[1] not in ORDER) for name in names
        )

    assert offenders(path, is_bad) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_inside_a_function(path):
    def is_bad(node):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return False
        return any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node))

    assert offenders(path, is_bad) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_the_outside_world_is_imported_in_app_alone(path):
    if dotted(path).startswith("app."):
        return
    used = {name.split(".")[0] for node in ast.walk(tree(path)) for name in imported(node, "")}
    assert used & APP_ONLY == set()


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_frozen_modules_are_not_mutated(path):
    def is_bad(node):
        return isinstance(node, ast.Attribute) and node.attr in ("__setattr__", "__delattr__")

    assert offenders(path, is_bad) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_prints_outside_app(path):
    if dotted(path).startswith("app."):
        return
    assert offenders(path, lambda node: isinstance(node, ast.Name) and node.id == "print") == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_and_public_functions_say_what_they_do(path):
    module = tree(path)
    functions = [n for n in module.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    silent = [node.name for node in functions if ast.get_docstring(node) is None]
    assert ast.get_docstring(module)
    assert silent == []


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_public_classes_and_methods_say_what_they_do(cls):
    if not cls.is_public:
        return
    inherited = set().union(*(base.abstract for base in ancestors(cls)))
    silent = [
        name
        for name, has_docstring in cls.concrete.items()
        if not has_docstring and not name.startswith("_") and name not in inherited
    ]
    assert cls.has_docstring
    assert silent == []


def test_class_names_are_unique():
    names = [node.name for path in MODULES for node in tree(path).body if isinstance(node, ast.ClassDef)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_class_is_abstract_or_final(cls):
    is_abstract = bool(unimplemented(cls))
    is_subclassed = any(cls.name in other.bases for other in CLASSES.values())
    assert cls.name.lstrip("_").startswith("Abstract") == is_abstract, (
        "`Abstract` in the name and missing members go together"
    )
    assert is_abstract or not is_subclassed, "a concrete class is final"


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_only_abstract_members_are_overridden(cls):
    taken = set().union(*(base.concrete.keys() for base in ancestors(cls)))
    assert taken & cls.concrete.keys() == set()


def test_the_rules_see_what_they_are_meant_to():
    """The reading of the syntax trees itself, on code that breaks the rules."""
    code = ast.parse(
        "from scenefit.app import plot\nfrom . import psf\nfrom ..model.scene import Scene\nimport asdf.tags"
    )
    names = [name for node in code.body for name in imported(node, "sky")]
    assert {"scenefit.app.plot", "scenefit.sky.psf", "scenefit.model.scene", "asdf.tags"} <= set(names)
    base = read_class(ast.parse("class B:\n  x: AbstractVar[int]\n  @abstractmethod\n  def f(self): ...").body[0], "m")
    assert base.abstract == {"x", "f"}
    assert all(RANK[a] < RANK[b] for a, b in pairwise(RANK))
    assert unimplemented(CLASSES["AbstractMorphology"])
