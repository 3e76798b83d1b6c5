"""Settings of a fit from the command line: defaults, a TOML file, options."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scenefit.survey.initialize import MODELS

COVERAGES = ("union", "intersection")
NOISES = ("measured", "weights")
NAMES = ("free_shift", "free_rotation", "free_background", "correlated")
"""Settings that are names of observations."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to fit and how.

    Attributes
    ----------
    input : Path
        Multi-instrument FITS file.
    catalog : Path or None
        Table of positions instead of the file's HDU CATALOG; where there is neither, sources are detected.
    model : str
        What sources are made of, see `scenefit.initialize`.
    free_shift : tuple of str
        Observations whose offset is fitted.
    free_rotation : tuple of str
        Observations whose rotation is fitted.
    free_background : tuple of str
        Observations whose background is fitted.
    correlated : tuple of str
        Observations whose noise is correlated: it is measured where there are no sources, or the run ends.
    noise : "measured" or "weights"
        That of all other observations: measured as well, and taken as correlated where it is and can be measured; or that of
        independent pixels, as the weights have it.
    coverage : str
        Of the model frame: "union" or "intersection".
    zeropoints : dict of str to float
        AB magnitude of one data unit by observation, instead of those in the file.
    rtol : float
    max_steps : int
    """

    input: Path
    catalog: Path | None = None
    model: str = "auto"
    free_shift: tuple[str, ...] = ()
    free_rotation: tuple[str, ...] = ()
    free_background: tuple[str, ...] = ()
    correlated: tuple[str, ...] = ()
    noise: str = "measured"
    coverage: str = "union"
    zeropoints: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rtol: float = 0.02
    max_steps: int = 100

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model is one of {', '.join(MODELS)}; got {self.model!r}.")
        if self.noise not in NOISES:
            raise ValueError(f"noise is one of {', '.join(NOISES)}; got {self.noise!r}.")
        if self.coverage not in COVERAGES:
            raise ValueError(f"coverage is one of {', '.join(COVERAGES)}; got {self.coverage!r}.")
        if not 0 < self.rtol < math.inf or self.max_steps < 1:
            raise ValueError(
                f"rtol must be positive and finite, max_steps at least 1; got {self.rtol} and {self.max_steps}."
            )


def read_settings(path: str | os.PathLike, **options) -> Settings:
    """Return the settings for an input file: a FITS file, or a TOML file that names one.

    Parameters
    ----------
    path : path
        In a TOML file, keys are the attributes of `Settings`; paths are relative to its folder.
    **options
        Attributes of `Settings` that override the file; None is ignored.

    Raises
    ------
    FileNotFoundError
        If the file doesn't exist.
    ValueError
        If it isn't valid TOML, lacks `input` or has an unknown key or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a FITS file or a TOML file with settings; there is no such file.")
    values: dict[str, Any] = _read_toml(path) if path.suffix.lower() == ".toml" else {"input": path}
    values.update({name: value for name, value in options.items() if value is not None})
    return Settings(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    """Return the checked content of a TOML file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ValueError(f"{path}: not a valid TOML file: {exc}.") from exc
    kinds = {
        "input": str,
        "catalog": str,
        "model": str,
        "noise": str,
        "free_shift": list,
        "free_rotation": list,
        "free_background": list,
        "correlated": list,
        "coverage": str,
        "zeropoints": dict,
        "rtol": float,
        "max_steps": int,
    }
    for key, value in content.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(kinds)}."
            raise ValueError(f"{path}: unknown setting {key!r}{hint}")
        if kinds[key] is float and type(value) is int:
            content[key] = float(value)
        elif not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{path}: setting {key!r} wants a {kinds[key].__name__}; got {value!r}.")
    if "input" not in content:
        raise ValueError(f"{path}: expected a setting 'input', the FITS file to fit.")
    zeropoints = content.get("zeropoints", {})
    if wrong := {name: value for name, value in zeropoints.items() if type(value) not in (int, float)}:
        raise ValueError(f"{path}: setting zeropoints wants AB magnitudes by observation; got {wrong}.")
    content["zeropoints"] = {name: float(value) for name, value in zeropoints.items()}
    for key in ("input", "catalog"):
        if key in content:
            content[key] = path.parent / content[key]
    for key in NAMES:
        if not all(isinstance(name, str) for name in content.get(key, ())):
            raise ValueError(f"{path}: setting {key!r} wants names of observations; got {content[key]}.")
        if key in content:
            content[key] = tuple(content[key])
    return content
