"""Forced photometry: fluxes in any number of images of sources whose shapes and places are known."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import astropy.units as u
import equinox as eqx
import jax
import numpy as np
import scipy.sparse
from astropy.table import QTable

from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.infer.fluxes import FluxSolution, FluxSolver, NormalEquations, solution, wide_equations
from scenefit.model.scene import Scene
from scenefit.sky import units
from scenefit.sky.frame import Channel, band_of
from scenefit.survey.catalog import channel_label
from scenefit.survey.flags import PhotometryFlag

PARTIAL_LIGHT = 0.9
"""Fraction of a source's flux on pixels with information below which that is flagged."""
BATCH_PIXELS = 10**7
"""Pixels of observations that are prepared before the first of them is solved for."""
NUM_NAMED = 8
"""Sources named in a warning at most."""


class ForcedPhotometry(eqx.Module):
    """Fluxes of sources in images, with their covariances.

    Attributes
    ----------
    table : QTable
        One row a source, observation and channel: id; observation; channel (its name as in `catalog`); epoch (if channels are
        named (band, epoch)); flux, flux_err [nJy, or in data units if the observations have no zeropoint]; mag, mag_err [AB mag;
        NaN where the flux isn't positive]; upper_limit [as flux]; snr; flags (`PhotometryFlag` bits, explained in the table's
        metadata). Rows of one channel follow one another, sources in the order of the scene.
    images : QTable
        One row an observation and channel: observation, channel, epoch, background and background_err [flux per pixel],
        chi_square and num_pixels (with information).
    ids : tuple of str
        Sources, or components, in the order of the covariances.
    covariances : tuple of arrays, shape (channel, source, source)
        Of the fluxes, one array an observation, in the unit of the fluxes squared. Infinite variances, and no covariances, for
        what the data don't determine.
    channels : tuple of (str, tuple of channel)
        Name and channels of every observation, in the order of the covariances.
    """

    table: QTable
    images: QTable
    ids: tuple[str, ...] = eqx.field(static=True)
    covariances: tuple[np.ndarray, ...]
    channels: tuple[tuple[str, tuple[Channel, ...]], ...] = eqx.field(static=True)

    def covariance(self, observation: str, channel: Channel | None = None) -> np.ndarray:
        """Return the covariance of the fluxes of all sources in one image, shape (source, source).

        Parameters
        ----------
        observation : str
        channel : str or (band, epoch), optional
            Needed if the observation has more than one.

        Raises
        ------
        KeyError
            If there is no such image.
        """
        names = [name for name, _ in self.channels]
        if observation not in names:
            raise KeyError(f"There is no observation {observation!r}; there are {names}.")
        number = names.index(observation)
        channels = self.channels[number][1]
        channel = tuple(channel) if isinstance(channel, list) else channel
        if channel is None and len(channels) == 1:
            channel = channels[0]
        if channel not in channels:
            raise KeyError(f"{observation} wants one of its channels {list(channels)}; got {channel!r}.")
        return self.covariances[number][channels.index(channel)]

    def light_curve(self, name: str, band: str | None = None) -> QTable:
        """Return the rows of one source, in the order of the observations.

        Parameters
        ----------
        name : str
            Its id.
        band : str, optional
            Only in channels of that name, or called (band, epoch).

        Raises
        ------
        KeyError
            If there is no such source or band.
        """
        if name not in self.ids:
            raise KeyError(f"There is no source {name!r} in this photometry.")
        rows = self.table[np.asarray(self.table["id"]) == name]
        if band is None:
            return rows
        bands = [band_of(channel) for _, channels in self.channels for channel in channels]
        if band not in bands:
            raise KeyError(f"No channel has the band {band!r}; there are {sorted(set(bands))}.")
        return rows[np.array(bands) == band]


def forced_photometry(
    scene: Scene,
    observations: Sequence[Observation] | Observation,
    *,
    background: bool = True,
    components: bool = False,
    num_sigma: float = 3.0,
    progress: bool = True,
) -> ForcedPhotometry:
    """Measure the fluxes of all sources of a scene in images that may be others than it was made from.

    Shapes and positions are held. In each channel of each observation by itself, the fluxes of all components and the background
    are solved for together, without bounds: one linear problem, with the full covariance of neighbours. Fluxes may be negative,
    so that means of faint ones aren't biased.

    Parameters
    ----------
    scene : Scene
        Its fluxes and the channels of its frame don't matter; links must know the bands of the observations.
    observations : sequence of Observation
        Matched or not, of any depth, PSF and WCS, with channels of any name. Their astrometry, calibration and noise are held.
        Observations of one shape, noise and number of channels share a compilation.
    background : bool
        Whether a constant is solved for in each channel; if not, `Observation.background` is held. The slope is held in any case.
    components : bool
        Whether there is a row for every component of a composite source, called "source.component", instead of one for their sum.
    num_sigma : float
        Upper limits are so many standard errors above the flux, or above zero where that is negative.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    ForcedPhotometry

    Raises
    ------
    TypeError
        If scene or observations aren't.
    ValueError
        If there is no source or observation, names of observations repeat, only some observations are calibrated, an
        observation and the frame don't go together (see `Renderer.match`), a link doesn't know a band, or `num_sigma` isn't
        positive.

    Warns
    -----
    UserWarning
        If sources can't be told apart: they have infinite errors. Their fluxes add up to what is there.

    Notes
    -----
    Errors are those of the noise: shapes and positions count as known. For noise that isn't Gaussian the linear problem is
    reweighted until the fluxes change by less than a thousandth of their errors, which are then those of the Fisher information.
    """
    observations = _checked(scene, observations, num_sigma)
    solver = FluxSolver(scene, observations)
    ids, weights = _combinations(scene, components, background)
    rows, covariances = [], []
    confused: Counter[tuple[str, ...]] = Counter()
    names = [path.removeprefix("sources.").replace(".parts.", ".") for path, _ in scene.components()]
    for batch in _all_equations(solver, observations, background, progress):
        for obs, equations, order in batch:
            level = obs.noise.level()
            found = [solution(equations, c, order, level[c]) for c in range(len(obs.channels))]
            confused.update(
                tuple(sorted(_name(names, int(n)) for n in group)) for each in found for group in each.confused()
            )
            rows += [_Row(obs, c, each, *each.combined(weights)) for c, each in enumerate(found)]
            covariances.append(np.stack([row.covariance[: len(ids), : len(ids)] for row in rows[-len(found) :]]))
    _warn_of_confusion(confused, len(rows))
    unit = u.nJy if observations[0].flux_unit == "nJy" else u.dimensionless_unscaled
    return ForcedPhotometry(
        table=_table(rows, ids, weights, unit, num_sigma),
        images=_image_table(rows, background, unit),
        ids=tuple(ids),
        covariances=tuple(covariances),
        channels=tuple((obs.name, obs.channels) for obs in observations),
    )


class _Row(NamedTuple):
    """One image: channel `channel` of an observation, its solution, and the wanted sums with their covariance."""

    obs: Observation
    channel: int
    found: FluxSolution
    values: np.ndarray
    covariance: np.ndarray


def _checked(scene, observations, num_sigma) -> list[Observation]:
    """Return the observations as a list if all can be used."""
    if not isinstance(scene, Scene):
        raise TypeError(
            f"forced_photometry wants a Scene; got a {type(scene).__name__}. A FitResult has one: result.scene."
        )
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    if wrong := [obs for obs in observations if not isinstance(obs, Observation)]:
        raise TypeError(f"forced_photometry wants Observations; got {wrong[0]!r}.")
    if not observations:
        raise ValueError("forced_photometry wants at least one observation; got none.")
    if not scene.sources:
        raise ValueError("forced_photometry wants a scene with at least one source; it has none.")
    if repeated := sorted(name for name, count in Counter(obs.name for obs in observations).items() if count > 1):
        raise ValueError(f"Observation names must be distinct; {', '.join(map(repr, repeated))} repeat(s).")
    if len({obs.flux_unit for obs in observations}) > 1:
        plain = [obs.name for obs in observations if obs.flux_unit != "nJy"]
        raise ValueError(
            f"Either all observations are calibrated or none; {plain} have no zeropoint= or unit=, the others are in nJy."
        )
    for obs in observations:
        if (scene.frame.wcs is None) != (obs.wcs is None):
            having, lacking = (obs.name, "the frame") if scene.frame.wcs is None else ("the frame", obs.name)
            raise ValueError(f"{having} has a WCS and {lacking} doesn't: give both one, or neither.")
    if not num_sigma > 0:
        raise ValueError(f"num_sigma is the positive number of standard errors of upper limits; got {num_sigma!r}.")
    return observations


def _combinations(scene: Scene, components: bool, background: bool) -> tuple[list[str], scipy.sparse.csr_array]:
    """Return the ids of the rows, and which components (and the background, last of all) each is the sum of."""
    parts = [(name, path) for name, source in scene.sources.items() for path, _ in source.components(f"sources.{name}")]
    own = [path.removeprefix("sources.").replace(".parts.", ".") for _, path in parts]
    ids = own if components else list(scene.sources)
    members = np.array([ids.index(full if components else name) for (name, _), full in zip(parts, own, strict=True)])
    # The background, if there is one, is the last of both.
    members = np.append(members, len(ids)) if background else members
    shape = (len(ids) + background, len(members))
    weights = scipy.sparse.csr_array((np.ones(len(members)), (members, np.arange(len(members)))), shape=shape)
    return ids, weights


def _all_equations(
    solver: FluxSolver, observations: Sequence[Observation], background: bool, progress: bool
) -> Iterator[list[tuple[Observation, NormalEquations, np.ndarray]]]:
    """Yield the normal equations of all observations, in order, some at a time, and where components are among their unknowns.

    The host's share of some observations comes before the device's: threads of BLAS keep the cores for a while after they have
    finished, and the two would wait for each other.
    """
    where = {obs.name: solver.geometry(obs) for obs in with_progress(observations, "pointings", progress)}
    groups: dict[tuple, list[Observation]] = {}
    for obs in observations:
        if solver.is_local(obs, where[obs.name]):
            groups.setdefault((obs.shape[0], where[obs.name].window.shape), []).append(obs)
    windows = {}
    for group in groups.values():
        sizes = solver.windows(group, [where[obs.name] for obs in group])
        windows.update({obs.name: sizes for obs in group})
    order = solver.layout(background)
    shown = with_progress(observations, "forced photometry", progress)
    for batch in _batches(observations):
        local = [obs.name for obs in batch if obs.name in windows]
        exposures = {
            obs.name: solver.exposure(obs, windows[obs.name], where[obs.name]) for obs in batch if obs.name in local
        }
        found = []
        for obs, _ in zip(batch, shown, strict=False):
            if obs.name in windows:
                equations = solver.equations(windows[obs.name], exposures[obs.name], background)
                found.append((obs, jax.tree.map(np.asarray, equations), order))
            else:
                equations = wide_equations(solver.scene, obs, background)
                found.append((obs, equations, np.arange(len(order))))
        yield found
    # The end of the bar.
    next(shown, None)


def _batches(observations: Sequence[Observation]) -> Iterator[list[Observation]]:
    """Yield observations, in order, that have so many pixels together."""
    batch, size = [], 0
    for obs in observations:
        batch.append(obs)
        size += obs.data.size
        if size >= BATCH_PIXELS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _name(names: Sequence[str], number: int) -> str:
    """Return what an unknown is called."""
    return names[number] if number < len(names) else "the background"


def _warn_of_confusion(confused: Counter, count: int):
    """Warn of sources that can't be told apart."""
    if not confused:
        return
    (first, times), *others = confused.most_common()
    listed = ", ".join(first[:NUM_NAMED]) + (", ..." if len(first) > NUM_NAMED else "")
    more = f" So it is for {len(others)} other set(s)." if others else ""
    warnings.warn(
        f"The fluxes of {listed} can't be told apart in {times} of {count} image(s): their errors are infinite there, only their "
        f"sum is known.{more} Remove all but one, or make them one CompositeSource.",
        stacklevel=3,
    )


def _epochs(rows: Sequence[_Row]) -> np.ndarray | None:
    """Return the epoch of every image, as numbers if all are; None if there is none."""
    channels = [row.obs.channels[row.channel] for row in rows]
    epochs = [channel[1] if isinstance(channel, tuple) else None for channel in channels]
    if all(epoch is None for epoch in epochs):
        return None
    if all(isinstance(epoch, int | float | np.number) or epoch is None for epoch in epochs):
        return np.array([np.nan if epoch is None else epoch for epoch in epochs], float)
    return np.array(["" if epoch is None else str(epoch) for epoch in epochs])


def _labels(rows: Sequence[_Row], repeats: int) -> QTable:
    """Return the columns that name images, each repeated for so many sources."""
    table = QTable()
    table["observation"] = np.repeat([row.obs.name for row in rows], repeats)
    table["channel"] = np.repeat([channel_label(row.obs.channels[row.channel]) for row in rows], repeats)
    if (epochs := _epochs(rows)) is not None:
        table["epoch"] = np.repeat(epochs, repeats)
    return table


def _table(rows: Sequence[_Row], ids, weights, unit, num_sigma) -> QTable:
    """Return the table of fluxes."""
    count = len(ids)
    flux = np.concatenate([row.values[:count] for row in rows])
    error = np.sqrt(np.concatenate([np.diagonal(row.covariance)[:count] for row in rows]))
    table = _labels(rows, count)
    table.add_column(np.tile(np.array(ids, str), len(rows)), name="id", index=0)
    table["flux"], table["flux_err"] = flux * unit, error * unit
    is_njy = unit == u.nJy
    table["mag"] = (units.ab_magnitude(flux) if is_njy else np.full(len(flux), np.nan)) * u.mag
    table["mag_err"] = units.ab_magnitude_error(flux, error) * u.mag
    table["upper_limit"] = (np.fmax(flux, 0.0) + num_sigma * error) * unit
    table["snr"] = flux / error
    table["flags"] = np.concatenate([_flags(row, weights, count) for row in rows])
    table.meta["flags"] = {flag.name: int(flag) for flag in PhotometryFlag}
    table.meta["num_sigma"] = float(num_sigma)
    return table


def _flags(row: _Row, weights: scipy.sparse.csr_array, count: int) -> np.ndarray:
    """Return the flags of every source in one image."""
    lacking = weights[:count, : len(row.found.light)] @ (row.found.light < PARTIAL_LIGHT).astype(int)
    flags = np.where(lacking > 0, int(PhotometryFlag.PARTIAL), 0)
    has_flux = np.isfinite(row.values[:count])
    flags[~has_flux] |= PhotometryFlag.NO_DATA
    flags[has_flux & np.isinf(np.diagonal(row.covariance)[:count])] |= PhotometryFlag.CONFUSED
    if not row.found.is_settled:
        flags |= PhotometryFlag.NOT_CONVERGED
    return flags


def _image_table(rows: Sequence[_Row], background: bool, unit) -> QTable:
    """Return the table of images."""
    table = _labels(rows, 1)
    held = np.array([row.obs.background[row.channel] for row in rows])
    fitted = np.array([row.values[-1] if background else 0.0 for row in rows])
    error = np.array([np.sqrt(row.covariance[-1, -1]) if background else 0.0 for row in rows])
    table["background"], table["background_err"] = (held + fitted) * unit, error * unit
    table["chi_square"] = np.array([row.found.deviance for row in rows])
    table["num_pixels"] = np.array([row.found.num_pixels for row in rows])
    return table
