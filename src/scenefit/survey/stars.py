"""Stars and galaxies: whether a point explains a source as well as something extended does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import expit, log_ndtr

from scenefit.data.observation import Observation
from scenefit.sky.frame import Frame
from scenefit.survey.envelopes import psf_width


def star_scores(
    area: Float[np.ndarray, " source"], area_error: Float[np.ndarray, " source"], psf_area: float
) -> Float[np.ndarray, " source"]:
    """Return the probability that each source is a point, from the square of its half-light radius and its error.

    For small sources the image changes in proportion to this square, A, so that the likelihood is a Gaussian in it, of mean
    `area` and width `area_error`. A galaxy has a positive A, exponentially distributed with the mean `psf_area`; a point has
    A = 0. Before the data both are equally likely. With s the error and S the mean, the ratio of the evidences of galaxy
    and point is `sqrt(2 pi) (s / S) exp(u^2 / 2) Phi(u)`, with `u = A / s - s / S` and the normal distribution function Phi.

    Parameters
    ----------
    area, area_error : arrays, shape (source,)
        Half-light radius squared, PSF removed, and its standard error.
    psf_area : float
        Half-light radius squared of the sharpest PSF, in the same unit.

    Returns
    -------
    array, shape (source,)
        From 0 (a galaxy) to 1 (a point). 1/2 where the data can't tell, 1 for what is a point by its model (error 0 and no size),
        0 for what has a size without error; NaN where the error is unknown.
    """
    area, error = np.asarray(area, float), np.asarray(area_error, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = area / error - error / psf_area
        log_ratio = 0.5 * np.log(2 * np.pi) + np.log(error / psf_area) + 0.5 * excess**2 + log_ndtr(excess)
        scores = expit(-log_ratio)
    scores = np.where(np.isinf(error), 0.5, scores)
    scores = np.where(error == 0, np.where(area > 0, 0.0, 1.0), scores)
    return np.where(np.isnan(area) | np.isnan(error), np.nan, scores)


def sharpest_area(frame: Frame, observations: Sequence[Observation]) -> float:
    """Return the square of the half-light radius, in model pixels, of the sharpest PSF, as if it were Gaussian."""
    return float(2 * np.log(2) * min(psf_width(frame, obs) for obs in observations) ** 2)
