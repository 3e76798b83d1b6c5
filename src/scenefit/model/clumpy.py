"""Galaxies with unresolved clumps."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints

from scenefit.arrays import profiles
from scenefit.model.link import AbstractLink
from scenefit.model.morphology import AbstractMorphology, PointMorphology, SersicMorphology, as_parameter
from scenefit.sky import units


class ClumpyMorphology(AbstractMorphology):
    """A Sersic profile with unresolved clumps: a disk with star-forming regions, of one spectrum.

    Parameters
    ----------
    half_light_radius, sersic_index, ellipticity : float or link, float or link, array of shape (2,) or link
        Of the smooth light, as in `SersicMorphology`.
    offsets : array, shape (clump, 2)
        Positions (y, x) of the clumps relative to one another and, but for `shift`, to the center, in model pixels; not fitted.
    fractions : array, shape (clump,), or link
        Share of each clump in the flux; the smooth light has the rest. If they sum to more than 1 they are scaled to that.
    shift : array, shape (2,), or link
        Added to all offsets (y, x), model pixels. The center of a source is that of its smooth light, wherever its clumps are.

    Raises
    ------
    ValueError
        If offsets aren't finite pairs, or shares are negative.
    """

    half_light_radius: np.ndarray | Array | AbstractLink
    sersic_index: np.ndarray | Array | AbstractLink
    ellipticity: np.ndarray | Array | AbstractLink
    fractions: np.ndarray | Array | AbstractLink
    shift: np.ndarray | Array | AbstractLink
    offsets: np.ndarray | Array
    constraints: ClassVar = {
        **SersicMorphology.constraints,
        "fractions": constraints.nonnegative,
        "shift": constraints.real,
    }

    def __init__(self, half_light_radius, sersic_index, ellipticity, offsets, fractions, shift=(0.0, 0.0)):
        self.half_light_radius = as_parameter(half_light_radius, ())
        self.sersic_index = as_parameter(sersic_index, ())
        self.ellipticity = as_parameter(ellipticity, (2,))
        self.shift = as_parameter(shift, (2,))
        self.offsets = np.asarray(units.to_pixels(offsets, "The offsets of a ClumpyMorphology"), dtype=float)
        if self.offsets.ndim != 2 or self.offsets.shape[1] != 2 or not np.isfinite(self.offsets).all():
            raise ValueError(f"ClumpyMorphology wants finite offsets (y, x), shape (clump, 2); got {offsets}.")
        self.fractions = as_parameter(fractions, (len(self.offsets),))
        if not isinstance(self.fractions, AbstractLink) and not (self.fractions >= 0).all():
            raise ValueError(f"The fractions of clumps aren't negative; got {fractions}.")

    def padded(self, count: int) -> ClumpyMorphology:
        """Return the same light with so many clumps: those that are added have none."""
        room = count - len(self.offsets)
        fractions = np.asarray(self.fractions, dtype=float)
        fractions = np.pad(fractions, [(0, 0)] * (fractions.ndim - 1) + [(0, room)])
        offsets = np.pad(np.asarray(self.offsets), ((0, room), (0, 0)))
        return eqx.tree_at(lambda m: (m.offsets, m.fractions), self, (offsets, fractions))

    def _smooth(self) -> SersicMorphology:
        """Return the light between the clumps."""
        return SersicMorphology(self.half_light_radius, self.sersic_index, self.ellipticity)

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        fractions = jnp.asarray(self.fractions)
        fractions = fractions / jnp.maximum(jnp.sum(fractions), 1.0)
        clumps = profiles.evaluate_points(y, x, self.offsets + jnp.asarray(self.shift), fractions, psf_sigma)
        return (1 - jnp.sum(fractions)) * self._smooth().evaluate(y, x, psf_sigma) + clumps

    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:  # noqa: D102
        point = PointMorphology().radius(psf_sigma)
        clumps = float(np.abs(np.asarray(self.offsets) + np.asarray(self.shift)).max(initial=0.0)) + point
        return max(self._smooth().radius(psf_sigma, tolerance), clumps)
