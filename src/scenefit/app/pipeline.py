"""From files to files: what `scenefit fit` does."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import astropy
import jax
import numpy as np
from astropy.table import QTable

from scenefit.app import io, plot
from scenefit.app.config import NAMES, Settings
from scenefit.app.serialization import atomic_path, package_version, save
from scenefit.app.tablefile import write_catalog
from scenefit.data.observation import Observation
from scenefit.data.resampled import CorrelatedObservation
from scenefit.infer.fit import FitResult, Status, fit
from scenefit.model.morphology import PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.survey.catalog import catalog, channel_label, nuisance_errors
from scenefit.survey.initialize import initialize

try:
    import resource
except ImportError:  # Windows
    resource = None

FILES = ("catalog.ecsv", "model.asdf", "images.fits", "scene.png", "summary.json")
"""What a run writes."""
FREED = {
    "free_background": "background",
    "free_shift": "astrometry.shift",
    "free_rotation": "astrometry.rotation",
}
"""What of an observation each setting sets free."""


def run(
    settings: Settings, directory: Path, *, progress: bool = True, report: Callable[[str], None] | None = None
) -> tuple[FitResult, list[Path]]:
    """Fit the images of a file and write catalogue, model, images, picture and summary.

    Parameters
    ----------
    settings : Settings
    directory : Path
        From `io.prepare_output`.
    progress : bool
        Whether to show a progress bar.
    report : callable, optional
        Called with a message if the fit is interrupted (Ctrl-C): its best state is then measured and written.

    Returns
    -------
    FitResult
    list of Path
        Files written.

    Raises
    ------
    OSError, ValueError, KeyError
        For unusable input; nothing is written then.
    """
    clock = _Clock()
    observations = io.read_observations(settings.input, zeropoints=dict(settings.zeropoints) or None)
    names = [obs.name for obs in observations]
    for setting in NAMES:
        if unknown := [name for name in getattr(settings, setting) if name not in names]:
            raise ValueError(f"{setting}: no observation is named {', '.join(map(repr, unknown))}; there are {names}.")
    positions = io.catalog_in(settings.input) if settings.catalog is None else io.read_catalog(settings.catalog)
    observations = tuple(_with_noise(obs, settings, progress) for obs in observations)
    clock.lap("read")
    frame = Frame.from_observations(observations, settings.coverage)
    # What can't be free is said before anything takes long; for that, any source will do.
    anything = Scene(frame, [Source(frame.center, np.ones(len(frame.channels)), PointMorphology())])
    _freed(Parameters.default(anything, observations), settings)
    catalog_positions = None if positions is None else positions[0]
    scene = initialize(frame, observations, catalog_positions, model=settings.model, progress=progress)
    parameters = _freed(Parameters.default(scene, observations), settings)
    clock.lap("initialize")
    result = fit(scene, observations, parameters, progress=progress, rtol=settings.rtol, max_steps=settings.max_steps)
    clock.lap("fit")
    if result.status is Status.INTERRUPTED and report is not None:
        report("Interrupted: the best state so far is measured and saved. Ctrl-C once more ends without.")
    table = catalog(result, progress=progress)
    errors = nuisance_errors(result, "observations.*.astrometry", progress=progress)
    clock.lap("measure")
    written = write_results(directory, result, table)
    clock.lap("write")
    io.write_json(directory / "summary.json", summary(result, errors, clock.seconds))
    return result, [*written, directory / "summary.json"]


def _freed(parameters: Parameters, settings: Settings) -> Parameters:
    """Return the parameters with what the settings set free."""
    for setting, path in FREED.items():
        for name in getattr(settings, setting):
            parameters = parameters.free(f"observations.{name}.{path}")
    return parameters


def _with_noise(obs: Observation, settings: Settings, progress: bool) -> Observation:
    """Return an observation with the noise that the settings ask for."""
    if obs.name in settings.correlated:
        return CorrelatedObservation.from_observation(obs, progress=progress)
    return obs if settings.noise == "weights" else CorrelatedObservation.if_correlated(obs, progress=progress)


def write_results(directory: Path, result: FitResult, table: QTable) -> list[Path]:
    """Write catalogue, model, images and picture in place of those of an earlier run; return their paths."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    paths = [directory / name for name in FILES[:4]]
    write_catalog(paths[0], table)
    save(paths[1], result)
    io.write_images(paths[2], result.scene, result.observations)
    write_figure(paths[3], plot.scene(result.scene, result.observations))
    return paths


def write_figure(path: Path, figure):
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def summary(result: FitResult, errors: dict[str, np.ndarray], seconds: dict[str, float]) -> dict:
    """Return what summary.json holds; `errors` are those of the astrometry of observations, by path."""
    observations = {}
    for obs in result.observations:
        base = f"observations.{obs.name}.astrometry"
        seen = obs.on_frame()
        count = seen.noise.num_modes()
        chi_square = seen.chi_square(result.scene) / np.maximum(count, 1)
        labels = [channel_label(channel) for channel in obs.channels]
        observations[obs.name] = {
            "noise": type(obs.noise).__name__,
            "num_modes": {label: int(n) for label, n in zip(labels, count, strict=True)},
            "chi_square_per_pixel": {
                label: float(value) if n else None for label, value, n in zip(labels, chi_square, count, strict=True)
            },
            "offset_arcsec": [float(value) for value in obs.astrometry.shift],
            "offset_error_arcsec": [float(value) for value in errors.get(f"{base}.shift", np.full(2, np.nan))],
        }
        if f"{base}.rotation" in errors:
            observations[obs.name]["rotation_deg"] = float(obs.astrometry.rotation)
            observations[obs.name]["rotation_error_deg"] = float(errors[f"{base}.rotation"])
    return {
        "versions": {
            "scenefit": package_version(),
            "jax": jax.__version__,
            "numpy": np.__version__,
            "astropy": astropy.__version__,
            "python": platform.python_version(),
        },
        "seconds": {**seconds, "first_step": result.timing.get("first_step")},
        "status": result.status.name,
        "status_text": result.status.value,
        "loss": result.loss,
        "num_steps": result.num_steps,
        "num_sources": len(result.scene.sources),
        "peak_memory_mb": peak_memory_mb(),
        "observations": observations,
    }


def peak_memory_mb() -> float | None:
    """Return the largest resident memory of this process so far; None where the system doesn't say."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class _Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str):
        """Write down the time since the last stage."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
