"""Peer: scarlet2 on one field of HST and HSC images; run in its own environment (`pip install scarlet2==0.5.1`).

    python scarlet2_blend.py FIELD.fits OUT.npz [--max-iter 1000]

Follows scarlet2's multi-resolution how-to with the settings it recommends: union frame, ground image resampled to it,
one Gaussian start per catalogue position, positive spectra, morphologies in [0, 1], free shift of the ground image. Saves
the fitted model image with its WCS, so that another program can judge it, and the seconds of the fit.
"""

import argparse
import time
from functools import partial

import astropy.units as u
import jax.numpy as jnp
import numpy as np
import scarlet2 as sc2
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpyro.distributions import constraints

CHANNELS = {"HST": ["F814W"], "HSC": ["g", "r", "i", "z", "y"]}
HALF_SIZE, START_SIGMA = 30, 6.0


def read(path):
    """Return scarlet2 observations (HST, HSC), the factor that HST fluxes were multiplied by, and the catalogue."""
    with fits.open(path) as hdus:
        plane = {name: hdus[f"{name}_OBS"].data.astype("f4") for name in CHANNELS}
        factor = {"HST": float(np.percentile(plane["HSC"], 99.9) / np.percentile(plane["HST"], 99.9)), "HSC": 1.0}
        observations = [
            sc2.Observation(
                plane[name] * factor[name],
                weights=hdus[f"{name}_WEIGHTS"].data.astype("f4") / factor[name] ** 2,
                psf=hdus[f"{name}_PSF"].data.astype("f4"),
                wcs=WCS(hdus[f"{name}_OBS"].header),
                channels=channels,
                name=name,
            )
            for name, channels in CHANNELS.items()
        ]
        table = Table(hdus["CATALOG"].data)
        catalog = SkyCoord(ra=table["RA"] * u.deg, dec=table["DEC"] * u.deg, frame="fk5", equinox="J2000")
    return *observations, factor["HST"], catalog


def build(frame, observations, catalog):
    """Return the starting scene: the same Gaussian stamp at each position, the spectrum of its centre pixel."""
    grid = np.arange(-HALF_SIZE, HALF_SIZE + 1)
    profile = np.exp(-(grid[:, None] ** 2 + grid**2) / 2 / START_SIGMA**2)
    start = jnp.asarray(np.clip(0.5 * profile + 1e-3, 1e-6, 1 - 1e-6), dtype=jnp.float32)
    with sc2.Scene(frame) as scene:
        for position in catalog:
            sc2.Source(position, jnp.maximum(sc2.init.pixel_spectrum(observations, position), 1e-3), start)
    return scene


def main():
    """Fit and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("field")
    parser.add_argument("out")
    parser.add_argument("--max-iter", type=int, default=1000)
    options = parser.parse_args()
    sc2.set_validation(False)
    hst, hsc, factor, catalog = read(options.field)
    frame = sc2.Frame.from_observations([hst, hsc], coverage="union")
    hsc_resampled = sc2.CorrelatedObservation.from_observation(hsc, resample_to_frame=frame)
    hsc_resampled.match(frame)
    hst_correlated = sc2.CorrelatedObservation.from_observation(hst)
    hst_correlated.check_set_renderer(frame)
    scene = build(frame, [hst, hsc_resampled], catalog)
    step = partial(sc2.relative_step, factor=0.05)
    with sc2.Parameters(scene):
        for i, source in enumerate(scene.sources):
            sc2.Parameter(source.spectrum, name=f"s:{i}", constraint=constraints.positive, stepsize=step)
            sc2.Parameter(source.morphology, name=f"m:{i}", constraint=constraints.unit_interval, stepsize=0.1)
    with sc2.Parameters(hsc_resampled):
        sc2.Parameter(hsc_resampled.renderer[1].shift, name="shift", stepsize=1e-3 * u.arcsec)
    times = []
    start = time.perf_counter()
    fitted, (_, moved) = sc2.fit(
        scene,
        [hst_correlated, hsc_resampled],
        max_iter=options.max_iter,
        e_rel=1e-9,
        progress_bar=False,
        callback=lambda *_: times.append(time.perf_counter()),
    )
    seconds = time.perf_counter() - start
    model = np.array(fitted(), dtype=float)
    model[0] /= factor
    np.savez(
        options.out,
        model=model,
        header=frame.wcs.celestial.to_header_string(),
        shift=np.asarray(moved.get("shift"), dtype=float),
        seconds=seconds,
        first_step=times[0] - start,
        num_iter=len(times),
    )


if __name__ == "__main__":
    main()
