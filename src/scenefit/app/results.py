"""What `scenefit fit` left in a folder, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from astropy.table import QTable

from scenefit.app.serialization import load
from scenefit.infer.fit import FitResult

MODEL, CATALOG, SUMMARY = "model.asdf", "catalog.ecsv", "summary.json"
"""Names of the files that are read."""


class Results(NamedTuple):
    """The content of a folder of results."""

    fit: FitResult
    catalog: QTable
    summary: dict


def read_results(directory: Path) -> Results:
    """Read model, catalogue and summary from the folder of a fit.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If there is no such folder, it is a file, or one of the files isn't there.
    ValueError
        If one of them can't be read.
    """
    _check_files(directory, (MODEL, CATALOG, SUMMARY))
    return Results(read_model(directory), read_table(directory), _read_summary(directory / SUMMARY))


def read_model(directory: Path) -> FitResult:
    """Read the model from the folder of a fit; raises as `read_results`."""
    _check_files(directory, (MODEL,))
    result = load(directory / MODEL)
    if not isinstance(result, FitResult):
        raise ValueError(f"{directory / MODEL}: expected the result of a fit; it holds a {type(result).__name__}.")
    return result


def read_table(directory: Path) -> QTable:
    """Read the catalogue from the folder of a fit; raises as `read_results`."""
    _check_files(directory, (CATALOG,))
    try:
        return QTable.read(directory / CATALOG)
    # The readers raise errors of many kinds.
    except Exception as exc:
        raise ValueError(f"{directory / CATALOG}: expected the catalogue of a fit; reading it failed: {exc}") from exc


def _check_files(directory: Path, names):
    """Raise unless a folder has some files."""
    if directory.is_file():
        raise NotADirectoryError(f"{directory}: expected the folder that `scenefit fit` wrote into; this is a file.")
    if missing := [name for name in names if not (directory / name).is_file()]:
        what = f"{', '.join(missing)} not there" if directory.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{directory}: expected the results of `scenefit fit`; {what}.")


def _read_summary(path: Path) -> dict:
    """Return a summary."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ValueError(f"{path}: expected the summary of a fit; reading it failed: {exc}") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the summary of a fit; it holds a {type(content).__name__}.")
    return content
