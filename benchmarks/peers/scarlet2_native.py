"""Peer: scarlet2's rendering onto native pixels; run in its own environment (`pip install scarlet2==0.5.1`).

    python scarlet2_native.py FIELD.fits [--repeats 20] [--observation NAME] [--frame HEADER.txt]

FIELD has image HDUs NAME_OBS, NAME_WEIGHTS and NAME_PSF for every observation. What is timed is the renderer that
scarlet2's `Observation.match` chooses by itself where the pixels of an observation aren't those of the model: the model
image is transformed, resampled in Fourier space, multiplied by the ratio of the PSFs and transformed back to the pixels
of the observation. One call on a model image of random numbers, jitted, after a first call that compiles it and doesn't
count.

The model grid is the union of all observations, with the smallest pixels and a Gaussian PSF of 0.7 pixels, as
scarlet2's `Frame.from_observations` makes it; `--frame` gives another one, as the text of a FITS header with WCS,
NAXIS1 and NAXIS2. The channels of the model are those of the rendered observation only: the one with the largest pixels,
unless named. Ends with one JSON line.
"""

import argparse
import json
import pathlib
import time

import equinox as eqx
import jax
import numpy as np
import scarlet2 as sc2
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area


def read(path):
    """Return the observations of a multi-instrument file by name; channels are numbered per instrument."""
    observations = {}
    with fits.open(path) as hdus:
        for name in [hdu.name.removesuffix("_OBS") for hdu in hdus if hdu.name.endswith("_OBS")]:
            data, weights, psf = (
                hdus[f"{name}_{kind}"].data.astype("f4").reshape(-1, *hdus[f"{name}_{kind}"].shape[-2:])
                for kind in ("OBS", "WEIGHTS", "PSF")
            )
            observations[name] = sc2.Observation(
                data,
                weights=weights,
                psf=psf,
                wcs=WCS(hdus[f"{name}_OBS"].header, naxis=2),
                channels=[f"{name}{c}" for c in range(len(data))],
                name=name,
            )
    return observations


def make_frame(observations, observation, header):
    """Return the model frame with the channels of `observation`: of a header, or the union of all observations."""
    if header is not None:
        header = fits.Header.fromstring(header, sep="\n")
        shape, wcs, psf = (header["NAXIS2"], header["NAXIS1"]), WCS(header), sc2.GaussianPSF(0.7)
    else:
        union = sc2.Frame.from_observations(list(observations.values()), coverage="union")
        shape, wcs, psf = union.bbox.spatial.shape, union.wcs, union.psf
    channels = observation.frame.channels
    return sc2.Frame(sc2.Box((len(channels), *shape)), psf=psf, wcs=wcs, channels=channels)


def main():
    """Time the renderer and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field")
    parser.add_argument("--repeats", type=int, default=20, help="runs that the median is taken of")
    parser.add_argument("--observation", help="name of the observation to render")
    parser.add_argument("--frame", type=pathlib.Path, help="file with the FITS header of the model grid")
    options = parser.parse_args()
    sc2.set_validation(False)
    observations = read(options.field)
    name = options.observation or max(observations, key=lambda n: proj_plane_pixel_area(observations[n].frame.wcs))
    observation = observations[name]
    frame = make_frame(observations, observation, options.frame.read_text() if options.frame else None)
    start = time.perf_counter()
    observation.match(frame)
    match_seconds = time.perf_counter() - start
    model = jax.random.uniform(jax.random.key(0), frame.bbox.shape)
    render = eqx.filter_jit(lambda renderer, model: renderer(model))
    seconds = []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        image = jax.block_until_ready(render(observation.renderer, model))
        seconds.append(time.perf_counter() - start)
    if image.shape != observation.data.shape or not np.isfinite(image).all():
        raise RuntimeError(f"scarlet2 rendered shape {image.shape}, expected finite values of {observation.data.shape}")
    row = {
        "observation": name,
        "renderer": type(observation.renderer).__name__,
        "model_shape": list(frame.bbox.shape),
        "observed_shape": list(image.shape),
        "match_ms": 1e3 * match_seconds,
        "first_ms": 1e3 * seconds[0],
        "render_ms": 1e3 * float(np.median(seconds[1:])),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
