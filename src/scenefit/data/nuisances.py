"""How an observation may see the scene otherwise than its WCS, calibration and PSF say: what can be fitted of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import astropy.units as u
import equinox as eqx
import numpy as np
from numpyro.distributions import constraints

from scenefit.sky import units

LARGEST_ROTATION = 5.0
"""Degrees by which an observation may be turned; an image whose WCS is worse needs another WCS."""


_Numbers = float | int | Sequence | np.ndarray


class Astrometry(eqx.Module):
    """Where an observation's WCS is wrong: sources appear turned about the middle of the image first, then displaced.

    A source at the offset r (east, north) from the middle of the image, where its WCS puts it, appears at `R r + shift` with
    `R = ((cos t, sin t), (-sin t, cos t))`, t the rotation: `shift` is the displacement in the middle.

    Parameters
    ----------
    shift : array, shape (2,), or Quantity
        Arcsec (east, north) by which sources at given sky coordinates appear displaced in the image from where its
        WCS puts them. Model pixels (x, y) where there is no WCS.
    rotation : float or Quantity
        Degrees by which they appear turned about the middle of the image, from north towards east on the sky: position angles in
        the image are larger by that much than they are. From the y axis towards the x axis where there is no WCS. At most
        `LARGEST_ROTATION` either way.
    """

    shift: np.ndarray
    rotation: np.ndarray

    def __init__(self, shift: _Numbers = (0.0, 0.0), rotation: _Numbers = 0.0):
        shift = units.to_arcsec(shift, "The shift (east, north)")
        if shift.shape != (2,) or not np.isfinite(shift).all():
            raise ValueError(f"Astrometry wants a finite shift (east, north) in arcsec; got {shift}.")
        rotation = units.to_unit(rotation, u.deg, "The rotation")
        if rotation.shape != () or not abs(rotation) <= LARGEST_ROTATION:
            raise ValueError(
                f"Astrometry wants one rotation (north to east) in degrees, at most {LARGEST_ROTATION:g} either way; got "
                f"{rotation}. Correct the WCS of an image that is turned by more."
            )
        self.shift, self.rotation = shift, rotation


class Calibration(eqx.Module):
    """Where an observation's photometric calibration and PSF are wrong.

    Parameters
    ----------
    flux_scale : float or array, shape (channel,)
        What the image shows of the flux of every source; 1 by default.
    psf_variance : float or array, shape (channel,)
        By how much the variance of the true PSF along each axis exceeds that of the observation's PSF, in its pixels squared
        (negative: a sharper image); 0 by default. The PSF is convolved with a round Gaussian of that variance.
    """

    flux_scale: np.ndarray
    psf_variance: np.ndarray

    def __init__(self, flux_scale: _Numbers = 1.0, psf_variance: _Numbers = 0.0):
        self.flux_scale, self.psf_variance = np.asarray(flux_scale, float), np.asarray(psf_variance, float)
        if not (np.isfinite(self.flux_scale).all() and (self.flux_scale > 0).all()):
            raise ValueError(f"Calibration wants finite, positive flux scales; got {flux_scale}.")
        if not np.isfinite(self.psf_variance).all():
            raise ValueError(f"Calibration wants finite PSF variances in pixels squared; got {psf_variance}.")


class Nuisance(NamedTuple):
    """A parameter of an observation: its range, its unit, whether it is in units of the data, and free by default."""

    constraint: constraints.Constraint
    unit: str = ""
    scales_with_data: bool = False
    is_free: bool = False


NUISANCES = {
    "astrometry.shift": Nuisance(constraints.real, "arcsec"),
    "astrometry.rotation": Nuisance(constraints.interval(-LARGEST_ROTATION, LARGEST_ROTATION), "deg"),
    "calibration.flux_scale": Nuisance(constraints.positive),
    "calibration.psf_variance": Nuisance(constraints.real),
    "background": Nuisance(constraints.real, "flux/pixel", True),
    "background_slope": Nuisance(constraints.real, "flux/pixel", True),
}
"""By path below the observation, which is also where they are kept."""

SCALE = Nuisance(constraints.positive)
"""By what the standard deviations of Gaussian noise are multiplied."""
