"""Everything the project runs: `nox -l` lists the sessions, `nox -s NAME` runs one.

Needs Python 3.11+ and `pip install nox`; uv is used for the environments where it is installed.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# With several threads, OpenBLAS takes a hundred times as long for small matrices where cores are shared.
ENVIRONMENT = {"MPLBACKEND": "Agg", "OPENBLAS_NUM_THREADS": "1"}
# Compilation, on one core, is most of what tests take. The tests of a module share what they compiled.
PYTEST = ("pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile")
# Scripts of benchmarks/ that measure nothing: run only when named.
NO_BENCH = ("make_demo_field",)
# What each benchmark compares with, in an environment of its own.
ASTROPHOT, PYSERSIC, SCARLET2 = ("astrophot==0.18.0", "torch"), ("pysersic==0.1.5",), ("scarlet2==0.5.1",)
PEERS = {
    "joint_images": ASTROPHOT,
    "linked_bands": PYSERSIC,
    "multi_gaussian": ("imcascade==1.1",),
    "real_pair": SCARLET2,
    "rendering": SCARLET2,
    "scaling": SCARLET2,
    "stamps": ASTROPHOT,
}
# Second peers, by the option of the benchmark that takes their Python.
SECOND_PEERS = {"stamps": {"--pysersic-python": PYSERSIC}}


def pinned(tool: str) -> str:
    """Find the requirement `tool==version` in the dev extra of pyproject.toml."""
    pattern = re.compile(rf"{tool}(\[\w+\])?==[\w.]+")
    return next(line for line in PROJECT["optional-dependencies"]["dev"] if pattern.fullmatch(line))


def lower_bounds() -> list[str]:
    """Turn each `name>=version` of the dependencies and the extras of users into `name==version`."""
    bounds = []
    extras = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + extras["sim"] + extras["parquet"]:
        if not (match := re.fullmatch(r"([\w-]+)>=([\w.]+)", line)):
            raise ValueError(f"expected 'name>=version' in pyproject.toml, got {line!r}")
        bounds.append(f"{match[1]}=={match[2]}")
    return bounds


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job on the packaged demo field, with the package installed as users get it."""
    session.install(".")
    session.run("scenefit", "demo", "--out", "demo_output", "--overwrite", *session.posargs, env=ENVIRONMENT)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    session.install("-e", ".[dev,parquet,sim]")
    session.run(*PYTEST, *session.posargs, env=ENVIRONMENT)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """Run the tests with the oldest dependencies that pyproject.toml admits."""
    constraints = Path(session.create_tmp()) / "lower_bounds.txt"
    constraints.write_text("\n".join(lower_bounds()) + "\n")
    session.install("-c", str(constraints), "-e", ".[dev,parquet,sim]")
    session.run(*PYTEST, *session.posargs, env=ENVIRONMENT)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format, and that pre-commit pins the same tools as pyproject.toml."""
    session.install(pinned("ruff"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    ruff_version = pinned("ruff").partition("==")[2]
    for wanted in (f"rev: v{ruff_version}", f'additional_dependencies: ["{pinned("pyright")}"]'):
        if wanted not in hooks:
            session.error(f".pre-commit-config.yaml: expected {wanted!r}, the version in pyproject.toml")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package with pyright."""
    session.install("-e", ".", pinned("pyright"))
    session.run("pyright", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html; a warning is an error."""
    session.install("-e", ".[docs]")
    # Everything is read anew (-E): an unchanged page would keep its warnings to itself.
    session.run("sphinx-build", "-E", "-W", "--keep-going", "docs", "docs/_build/html", *session.posargs)


@nox.session
def tutorials(session: nox.Session) -> None:
    """Run the tutorials in turn; each writes its figures into the folder it is run in.

    That folder is tutorials/output, or the one given: `nox -s tutorials -- FOLDER`.
    """
    session.install("-e", ".[sim]")
    scripts = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))
    if not scripts:
        session.error("expected scripts tutorials/NN_*.py, found none")
    output = Path(*session.posargs).resolve() if session.posargs else ROOT / "tutorials" / "output"
    output.mkdir(parents=True, exist_ok=True)
    with session.chdir(output):
        for script in scripts:
            session.run("python", str(script), env=ENVIRONMENT)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks in turn, or the named ones: `nox -s bench -- scaling --sources 8 32 --json`.

    Leading arguments that name a file of benchmarks/ choose; the others go to each that runs. `--peers` makes environments
    with the peers and runs each beside those benchmarks that compare with it; `--peer-python PYTHON` takes an existing
    one, for the benchmarks that are named.
    """
    parser = argparse.ArgumentParser(prog="nox -s bench --", add_help=False, allow_abbrev=False)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-python")
    options, arguments = parser.parse_known_args(session.posargs)
    scripts = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
    chosen = []
    while arguments and arguments[0] in scripts:
        chosen.append(arguments.pop(0))
    session.install("-e", ".[sim]")
    for name in chosen or [name for name in scripts if name not in NO_BENCH]:
        more = []
        if name in PEERS and (options.peers or options.peer_python):
            more = ["--peer-python", options.peer_python or make_peer(session, PEERS[name])]
        if options.peers:
            for option, requirements in SECOND_PEERS.get(name, {}).items():
                more += [option, make_peer(session, requirements)]
        session.run("python", str(scripts[name]), *more, *arguments, env=ENVIRONMENT)


def make_peer(session: nox.Session, requirements: tuple[str, ...]) -> str:
    """Return the Python of an environment with a peer, made if it isn't there yet."""
    folder = Path(session.create_tmp()) / requirements[0].replace("==", "-")
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    if not Path(python).exists():
        session.run("python", "-m", "venv", str(folder))
    session.run(python, "-m", "pip", "install", "--quiet", *requirements, external=True)
    return python
