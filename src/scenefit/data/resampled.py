"""Observations whose noise is correlated, measured in the image or propagated through a resampling."""

from __future__ import annotations

import warnings

import numpy as np
from astropy.wcs import WCS

from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.correlation import PropagatedCorrelation, step_of
from scenefit.data.noise import WhiteNoise
from scenefit.data.nuisances import Astrometry, Calibration
from scenefit.data.observation import Observation, naming
from scenefit.data.resample import Resampling
from scenefit.sky.frame import Frame, pixel_map

LEAST_RATIO = 1.25
"""Ratio of the noise of large areas to that of independent pixels from which on noise is taken for correlated unasked."""


class CorrelatedObservation:
    """Makes observations with correlated noise: `Observation` objects like all others, with `CorrelatedNoise` as their noise."""

    @staticmethod
    def if_correlated(obs: Observation, *, progress: bool = True) -> Observation:
        """Return an observation with the noise measured in its image if that is correlated; as it is if not or unknown.

        Correlated counts as such where the noise of large areas differs by more than a quarter from that of independent pixels.

        Parameters
        ----------
        obs : Observation
        progress : bool
            See `from_observation`, which raises an error where too few pixels are free of sources.
        """
        if not isinstance(obs.noise, WhiteNoise):
            return obs
        with warnings.catch_warnings():
            # Correlations that are known badly aren't used.
            warnings.simplefilter("error", UserWarning)
            try:
                measured = CorrelatedObservation.from_observation(obs, progress=progress)
            except (ValueError, UserWarning):
                return obs
        noise = measured.noise
        ratio = np.sqrt(np.asarray(noise.independent()[1]).sum(axis=(1, 2)))
        return measured if np.abs(np.log(np.maximum(ratio, 1e-3))).max() > np.log(LEAST_RATIO) else obs

    @staticmethod
    def from_observation(
        obs: Observation,
        resample_to: Frame | Observation | WCS | None = None,
        *,
        order: int = 3,
        mask=None,
        max_lag: int | None = None,
        varying: bool = False,
        progress: bool = True,
    ) -> Observation:
        """Return an observation with the noise that its pixels really have.

        Without a target the noise is measured where the image holds no sources, for data that were resampled (drizzled,
        coadded) before. With a target, data, mask, weights and PSF are resampled to its pixels by a Lanczos kernel, and the noise
        is exactly what independent noise of the native pixels becomes.

        Parameters
        ----------
        obs : Observation
            With independent Gaussian noise (`WhiteNoise`).
        resample_to : Frame, Observation or WCS with a `pixel_shape`, optional
            Whose pixels to resample to.
        order : int
            Of the Lanczos kernel, 2 to 5: see `Resampling`.
        mask, max_lag, varying
            For noise that is measured: see `CorrelatedNoise.measured`.
        progress : bool
            Whether to show a progress bar on standard error: see `CorrelatedNoise`.

        Returns
        -------
        Observation
            Not matched to a frame. Fluxes keep their unit.

        Raises
        ------
        TypeError
            If the observation or the target isn't one.
        ValueError
            If its noise isn't white, too few pixels are clean, what is to be measured is a background, its `astrometry` has a
            rotation, or the target is elsewhere.
        """
        if not isinstance(obs, Observation):
            raise TypeError(f"CorrelatedObservation.from_observation wants an Observation; got a {type(obs).__name__}.")
        with naming(obs.name):
            if not isinstance(obs.noise, WhiteNoise):
                raise ValueError(
                    f"correlated noise is made from weights of independent pixels; got {type(obs.noise).__name__}. Give an "
                    "observation with weights=."
                )
            weights = np.asarray(obs.noise.weights, dtype=float) / np.asarray(obs.noise.scale)[:, None, None] ** 2
            if resample_to is None:
                residual = obs.data - obs.background_image()
                options = {"mask": mask, "max_lag": max_lag, "varying": varying, "progress": progress}
                return obs.with_noise(CorrelatedNoise.measured(residual, weights, **options))
        return _resampled(obs, weights, *_grid(resample_to), order, progress)


def _grid(target) -> tuple[WCS | None, tuple[int, int]]:
    """Return WCS and shape of the pixels of a target."""
    if isinstance(target, Frame | Observation):
        return target.wcs, (int(target.shape[1]), int(target.shape[2]))
    if isinstance(target, WCS) and target.pixel_shape is not None:
        width, height = target.pixel_shape[:2]
        return target, (int(height), int(width))
    raise TypeError(
        f"resample_to wants a Frame, an Observation, or a WCS with a pixel_shape; got a {type(target).__name__}."
    )


def _resampled(
    obs: Observation, weights: np.ndarray, wcs, shape: tuple[int, int], order: int, progress: bool
) -> Observation:
    """Return the observation, with its weights, on other pixels."""
    valid = weights > 0
    with naming(obs.name):
        if obs.astrometry.rotation != 0:
            raise ValueError(
                "a rotation is about the middle of the native image: resample first, then set astrometry=."
            )
        resampling = Resampling.between(obs.wcs, obs.shape[1:], wcs, shape, order)
        data, usable = resampling.apply(obs.data, valid)
        if not usable.any():
            raise ValueError(
                "no pixel of the target lies, kernel included, on pixels with information; nothing to fit."
            )
    sigma = np.sqrt(np.where(valid, 1 / np.where(valid, weights, 1.0), 0.0)).reshape(len(data), -1)
    rows = resampling.rows(valid)
    weight = np.stack([row.weight * plane[row.index] for row, plane in zip(rows, sigma, strict=True)])
    variance = (weight**2).sum(axis=2).reshape(data.shape)
    to_native = np.linalg.inv(resampling.affine)
    area = abs(np.linalg.det(to_native))
    correlation = PropagatedCorrelation(rows[0].index, weight, shape, step_of(1 / np.sqrt(area)))
    new_weights = np.where(usable, 1 / np.where(usable, variance, 1.0), 0.0)
    middle = pixel_map(wcs, obs.wcs, *((n - 1) / 2 for n in shape)) - [(n - 1) / 2 for n in obs.shape[1:]]
    return Observation(
        data,
        noise=CorrelatedNoise(new_weights, correlation, progress=progress),
        psf=resampling.resampled_psf(obs.psf),
        wcs=wcs,
        channels=obs.channels,
        name=obs.name,
        unit="nJy" if obs.flux_unit == "nJy" else None,
        background=(obs.background + obs.background_slope @ middle) * area,
        background_slope=obs.background_slope @ to_native * area,
        astrometry=Astrometry(obs.astrometry.shift),
        calibration=Calibration(obs.calibration.flux_scale, obs.calibration.psf_variance / area),
    )
