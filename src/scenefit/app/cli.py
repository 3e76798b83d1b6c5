"""The command line: scenefit demo, fit, show, inspect, report, validate, info."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Annotated

import astropy.units as u
import jax
import numpy as np
import typer

from scenefit.app import datasets, io, plot
from scenefit.app.comparison import read_sources, statistics_text, write_validation
from scenefit.app.config import Settings, read_settings
from scenefit.app.fitsfile import is_fits
from scenefit.app.pipeline import run, write_figure
from scenefit.app.report import MAX_STAMPS, write_report
from scenefit.app.results import read_model, read_results, read_table
from scenefit.app.serialization import load, package_version
from scenefit.data.observation import Observation
from scenefit.infer.fit import FitResult, Status
from scenefit.model.scene import Scene
from scenefit.sky.frame import pixel_scale_of
from scenefit.survey.validate import validate

COMPILED_BYTES = 2**30
"""Compiled programs that are kept between runs, the last used ones."""

app = typer.Typer(
    help="Fit one scene to images of different instruments, each in its own pixels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `scenefit fit` wrote.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results in a folder that exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def demo(out: Out = Path("scenefit_demo"), overwrite: Overwrite = False, quiet: Quiet = False):
    """Fit the packaged field: a simulated blend seen by HST and HSC."""
    _fit(Settings(input=datasets.load("demo").path, model="pixel", free_shift=("HSC",)), out, overwrite, quiet)


@app.command()
def fit(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Multi-instrument FITS file, or TOML settings.")],
    out: Out,
    catalog: Annotated[Path | None, typer.Option(help="Table with RA and DEC, instead of the HDU CATALOG.")] = None,
    model: Annotated[str | None, typer.Option(help="What sources are made of: auto, pixel, gaussian or point.")] = None,
    free_shift: Annotated[
        list[str] | None, typer.Option(help="Observation whose offset is fitted; repeatable.")
    ] = None,
    free_rotation: Annotated[
        list[str] | None, typer.Option(help="Observation whose rotation is fitted; repeatable.")
    ] = None,
    free_background: Annotated[
        list[str] | None, typer.Option(help="Observation whose background is fitted; repeatable.")
    ] = None,
    correlated: Annotated[
        list[str] | None, typer.Option(help="Observation whose noise is correlated, and measured; repeatable.")
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(help="That of all others: measured, or as the weights have it.", metavar="measured|weights"),
    ] = None,
    coverage: Annotated[str | None, typer.Option(help="Model frame: union or intersection.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Tolerance of the fit, in standard deviations.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps at most.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
):
    """Fit the images of a file; write catalog.ecsv, model.asdf, images.fits, scene.png and summary.json."""
    settings = read_settings(
        source,
        catalog=catalog,
        model=model,
        free_shift=tuple(free_shift) if free_shift else None,
        free_rotation=tuple(free_rotation) if free_rotation else None,
        free_background=tuple(free_background) if free_background else None,
        correlated=tuple(correlated) if correlated else None,
        noise=noise,
        coverage=coverage,
        rtol=rtol,
        max_steps=max_steps,
    )
    _fit(settings, out, overwrite, quiet)


@app.command()
def show(directory: Directory):
    """Print the results in a folder and draw scene.png, sources.png and convergence.png there from the saved model."""
    result, table, summary = read_results(directory)
    typer.echo(json.dumps(summary, indent=2))
    typer.echo("\n".join(table.pformat(max_lines=-1, max_width=-1)))
    figures = {
        "scene.png": plot.scene(result.scene, result.observations),
        "sources.png": plot.sources(result.scene, result.observations),
        "convergence.png": plot.convergence(result),
    }
    for name, figure in figures.items():
        write_figure(directory / name, figure)
        typer.echo(str(directory / name))


@app.command()
def inspect(
    directory: Directory,
    source: Annotated[list[str] | None, typer.Option(help="Source to look at, by its id; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG to write; inspect.png or inspect_ID.png in DIR.")] = None,
):
    """Draw the saved model beside the images: observed, rendered, residual; or sources, and the data minus all others."""
    result = read_model(directory)
    names = list(result.scene.sources)
    if unknown := [name for name in source or () if name not in names]:
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise KeyError(f"{directory}: no source is called {unknown[0]!r}; there are {len(names)}: {some}.")
    # Names may hold what file names can't.
    default = "_".join(["inspect", *(re.sub(r"[^\w.-]", "-", name) for name in source or ())])
    path = directory / f"{default[:100]}.png" if out is None else out
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: expected a file name that ends in .png.")
    if source:
        figure = plot.sources(result.scene, result.observations, source)
        table = read_table(directory)
        for row in table[[str(name) in source for name in table["id"]]]:
            typer.echo("\n".join(f"{name:>24}  {_rounded(row[name])}" for name in table.colnames))
    else:
        figure = plot.scene(result.scene, result.observations)
    write_figure(path, figure)
    typer.echo(str(path))


@app.command()
def report(
    directory: Directory,
    stamps: Annotated[int, typer.Option(help="Number of sources that are shown one by one.")] = MAX_STAMPS,
    quiet: Quiet = False,
):
    """Write report.html in a folder of results: one page that works offline."""
    typer.echo(str(write_report(directory, num_stamps=stamps, progress=not quiet)))


@app.command("validate")
def compare(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="Catalogue, such as catalog.ecsv of a fit.")],
    truth: Annotated[
        Path, typer.Argument(metavar="TRUTH", help="Table with ra, dec, mag_CH or flux_CH; or FITS with an HDU TRUTH.")
    ],
    out: Out,
    channel: Annotated[
        str | None, typer.Option(help="Channel of the magnitudes; the first common one by default.")
    ] = None,
    radius: Annotated[float, typer.Option(help="Matching radius in arcsec.")] = 0.3,
    magnitude_tolerance: Annotated[
        float, typer.Option(help="Largest difference of matched magnitudes; inf for positions alone.")
    ] = 2.0,
    outlier: Annotated[float, typer.Option(help="Magnitudes and colours off by more count as outliers.")] = 0.5,
    overwrite: Overwrite = False,
):
    """Compare a catalogue with the truth; write validation.json and validation.png."""
    options = {"--radius": radius, "--magnitude-tolerance": magnitude_tolerance, "--outlier": outlier}
    for name, value in options.items():
        if not value > 0 or (name != "--magnitude-tolerance" and math.isinf(value)):
            raise ValueError(f"{name} must be positive; got {value}.")
    with io.output_folder(out, overwrite) as directory:
        result = validate(
            read_sources(catalog),
            read_sources(truth, "TRUTH"),
            radius=radius * u.arcsec,
            channel=channel,
            magnitude_tolerance=magnitude_tolerance,
            outlier=outlier,
        )
        written = write_validation(directory, result)
    typer.echo(statistics_text(result))
    for path in written:
        typer.echo(f"  {path}")


@app.command()
def info(path: Annotated[Path, typer.Argument(metavar="FILE", help="Multi-instrument FITS file or saved model.")]):
    """Say what a file holds."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file; this is a folder. Results of a fit: scenefit show {path}")
    if is_fits(path):
        observations, positions = io.read_observations(path), io.catalog_in(path)
        typer.echo(f"{path}: {len(observations)} observation(s)")
    else:
        content = load(path)
        observations, positions = _observations_in(content), None
        typer.echo(f"{path}: {type(content).__name__}")
        if isinstance(content, FitResult):
            typer.echo(f"  {content.status.value}, {len(content.scene.sources)} sources, loss {content.loss:.6g}")
        if isinstance(content, Scene):
            shape = " x ".join(str(n) for n in content.frame.shape)
            typer.echo(f"  {len(content.sources)} sources on a frame of {shape}")
    for obs in observations:
        scale = "no WCS" if obs.wcs is None else f'{pixel_scale_of(obs.wcs):.4g}"/pixel'
        channels = ", ".join(str(channel) for channel in obs.channels)
        typer.echo(f"  {obs.name}: {' x '.join(str(n) for n in obs.shape)}, {channels}; {scale}; {obs.flux_unit}")
    if positions is not None:
        typer.echo(f"  catalogue of {len(positions[0])} sources")


def _observations_in(content) -> tuple[Observation, ...]:
    """Return the observations that a loaded object consists of or contains."""
    if isinstance(content, FitResult):
        return content.observations
    several = content if isinstance(content, tuple) else (content,)
    return tuple(each for each in several if isinstance(each, Observation))


def _rounded(value) -> str:
    """Return a value of a table, with its unit, as text."""
    number, unit = getattr(value, "value", value), getattr(value, "unit", "")
    return f"{number:.8g} {unit}".rstrip() if isinstance(number, float | np.floating | np.ndarray) else str(number)


def _fit(settings: Settings, out: Path, overwrite: bool, quiet: bool):
    """Run a fit and name what it wrote."""
    with io.output_folder(out, overwrite) as directory:
        result, written = run(
            settings, directory, progress=not quiet, report=lambda message: typer.echo(message, err=True)
        )
    typer.echo(f"{len(result.scene.sources)} sources, {result.num_steps} steps, fit {result.status.value}. Written:")
    for path in written:
        typer.echo(f"  {path}")
    if result.status is Status.INTERRUPTED:
        raise typer.Exit(130)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"scenefit {package_version()}")
        raise typer.Exit
    return wanted


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False):
    pass


def keep_compiled_programs():
    """Let JAX find the programs that earlier runs have compiled, unless it has been told where to keep them.

    They are kept apart by machine: code for one processor may not run on another.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "scenefit" / "compiled" / platform.node()))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main():
    """Run the command line; unusable input ends it with a message and exit code 2."""
    keep_compiled_programs()
    try:
        app()
    except (OSError, ValueError, KeyError, TypeError) as exc:
        message = exc.args[0] if isinstance(exc, KeyError) and exc.args else exc
        typer.echo(f"scenefit: {message}", err=True)
        raise SystemExit(2) from exc
