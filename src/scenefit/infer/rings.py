"""Rings of multi-Gaussian components as numbers that the model is linear in: their fluxes."""

from __future__ import annotations

import equinox as eqx
import numpy as np
import numpyro.distributions as dist

from scenefit.infer.fit import FitResult
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem
from scenefit.model.morphology import MultiGaussianMorphology, links
from scenefit.model.parameters import Parameters

RING_SHARE, WIDE_RADII, WIDE_POWER = 0.1, 2.0, 6.0
"""Scale of the prior of the amplitudes of rings within so many half-light radii, and how it falls with the width outside."""


class Rings(eqx.Module):
    """Rings of a component whose amplitudes are the same in all entries of its spectrum that they belong to.

    Their numbers are the fluxes of the rings in the first entry, and the ratio of every other entry to it.

    Attributes
    ----------
    path : str
        Of the component.
    plane : int
        Row of the amplitudes.
    entries : tuple of int
        Of the spectrum, the brightest first.
    amplitudes : array of int, shape (ring,)
        Coordinates of the amplitudes.
    fluxes : array of int, shape (entry,)
        Coordinates of these entries.
    start : array, shape (ring + entry - 1,)
        Ring fluxes and ratios of the fit.
    """

    path: str = eqx.field(static=True)
    plane: int = eqx.field(static=True)
    entries: tuple[int, ...] = eqx.field(static=True)
    amplitudes: np.ndarray
    fluxes: np.ndarray
    start: np.ndarray

    def __len__(self):
        return len(self.start)

    def insert(self, vectors: np.ndarray, numbers: np.ndarray):
        """Write amplitudes and spectrum of draws of the numbers into vectors of coordinates, shape (..., n)."""
        count = len(self.amplitudes)
        rings, ratios = numbers[..., :count], np.maximum(numbers[..., count:], 0.0)
        total = rings.sum(axis=-1, keepdims=True)
        equal = np.full(count, 1 / count)
        vectors[..., self.amplitudes] = np.where(total > 0, rings / np.where(total > 0, total, 1.0), equal)
        vectors[..., self.fluxes] = total * np.concatenate([np.ones_like(total), ratios], axis=-1)


def ring_prior(sigmas, half_light_radius: float) -> dist.HalfCauchy:
    """Return a prior of ring amplitudes that leaves rings much wider than a source empty unless the data ask for them.

    Half-Cauchy of scale 0.1 for widths up to twice the half-light radius r of the source, and 0.1 (sigma / 2 r)^-6 beyond. Wide
    rings look like a sky; non-negative as they are, they would soak up what the sky leaves, and make any source too large.

    Parameters
    ----------
    sigmas : array, shape (ring,)
        Widths, as in `MultiGaussianMorphology`.
    half_light_radius : float
        Circularised, in the same unit; roughly.
    """
    sigmas, radius = np.asarray(sigmas, dtype=float), float(half_light_radius)
    if not (np.isfinite(sigmas) & (sigmas > 0)).all() or not 0 < radius < np.inf:
        raise ValueError(f"Widths of rings and a half-light radius are positive; got {sigmas} and {radius}.")
    return dist.HalfCauchy(RING_SHARE * np.minimum(1.0, (sigmas / (WIDE_RADII * radius)) ** -WIDE_POWER))


def ring_columns(problem: Problem, layout: Layout, result: FitResult, vector: np.ndarray):
    """Return all rings with free amplitudes, and columns of the design that they are made of.

    A column is a vector of coordinates at which to differentiate, what it counts in each number, and the coordinate along which.
    """
    parameters, index = result.parameters, np.asarray(problem.index)
    groups, columns, place = [], [], 0
    for path, component in result.scene.components():
        name = f"{path}.morphology.amplitudes"
        if not isinstance(component.morphology, MultiGaussianMorphology) or not parameters.is_fitted(name):
            continue
        _check_untied(parameters, path)
        amplitudes, fluxes = (index[layout.places[each][0]] for each in (name, f"{path}.spectrum.flux"))
        rows = amplitudes.reshape(-1, amplitudes.shape[-1])
        for plane, entries in enumerate(_entries(path, component, result.scene.frame.channels)):
            if not len(entries):
                continue
            entries = entries[np.argsort(-vector[fluxes[entries]], kind="stable")]
            group = _rings(path, plane, entries, rows[plane], fluxes[entries], vector)
            columns += _columns(group, place, vector)
            groups.append(group)
            place += len(group)
    return groups, columns


def _rings(path, plane, entries, amplitudes, fluxes, vector) -> Rings:
    """Return the rings of a component in the entries of its spectrum that share amplitudes."""
    values, own = vector[fluxes], vector[amplitudes]
    shares = own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / len(own))
    ratios = values[1:] / values[0] if values[0] > 0 else np.ones(len(values) - 1)
    start = np.concatenate([values[0] * shares, ratios])
    return Rings(path, plane, tuple(int(entry) for entry in entries), amplitudes, fluxes, start)


def _columns(group: Rings, place: int, vector: np.ndarray):
    """Return the columns (see `ring_columns`) of rings whose first number is `place`: each ring alone, in each entry."""
    count, columns = len(group.amplitudes), []
    for ring in range(count):
        point = vector.copy()
        point[group.amplitudes] = np.arange(count) == ring
        columns.append((point, {place + ring: 1.0}, group.fluxes[0]))
        for entry, flux in enumerate(group.fluxes[1:]):
            ratio = place + count + entry
            weights = {place + ring: group.start[count + entry], ratio: group.start[ring]}
            columns.append((point, weights, flux))
    return columns


def _entries(path, component, channels) -> list[np.ndarray]:
    """Return which entries of the spectrum each row of the amplitudes is for."""
    layout = component.spectrum.layout(channels)
    link = links(component.morphology).get("amplitudes")
    basis = np.ones((len(channels), 1)) if link is None else link.basis(channels)
    if not ((basis == 0) | (basis == 1)).all() or not (basis.sum(axis=1) == 1).all():
        raise ValueError(
            f"Linear sampling wants amplitudes that are free in every band (link.PerBand) or the same in all; those of {path} "
            f"are linked by {type(link).__name__}. Use method='nuts'."
        )
    planes = np.argmax(basis, axis=1)
    found = [np.unique(layout[(planes == plane) & (layout >= 0)]) for plane in range(basis.shape[1])]
    together = np.concatenate(found)
    if len(np.unique(together)) < len(together):
        raise ValueError(f"{path}: a flux of its spectrum is that of channels with different amplitudes.")
    return found


def _check_untied(parameters: Parameters, path: str):
    """Raise ValueError if flux or amplitudes of rings are tied, or the flux isn't free."""
    flux, amplitudes = f"{path}.spectrum.flux", f"{path}.morphology.amplitudes"
    if tied := [p.path for p in parameters if p.tied_to and {p.path, p.tied_to} & {flux, amplitudes}]:
        raise ValueError(
            f"Linear sampling wants fluxes and amplitudes of rings that aren't tied; {', '.join(tied)} are."
        )
    if not parameters.table[flux].free:
        raise ValueError(f"{amplitudes} is free and {flux} isn't: free both, or fix both.")
