"""Peer: first step and step of scarlet2 on a field of many sources; run in its own environment (`scarlet2==0.5.1`).

    python scarlet2_scaling.py NUM_SOURCES SIZE [--steps 30]

The fields are those of benchmarks/scaling.py: the same recipe and the same random numbers. Every source starts from a
round Gaussian stamp of 31 pixels at its true position and from its true colors; spectra are positive, morphologies lie
in [0, 1], with the step sizes that scarlet2's tutorials use. First step: from the call of `scarlet2.fit` to the end of
its first step, compilation included. Step: the median of the later ones, each a forward and an adjoint rendering of the
model. Ends with one JSON line. Compilation grows with the number of sources: 128 of them take minutes.
"""

import argparse
import json
import resource
import sys
import time
from functools import partial

import jax.numpy as jnp
import numpy as np
import scarlet2 as sc2
from numpyro.distributions import constraints

CHANNELS = ["g", "r", "i", "z", "y"]
PSF_SIGMA, NOISE, HALF_STAMP, START_SIGMA = 1.7, 0.3, 15, 3.0


def simulate(num_sources, size):
    """Return data (channel, y, x), positions (y, x), fluxes (source, channel), drawn as benchmarks/scaling.py does."""
    rng = np.random.default_rng(0)
    margin = min(25, size // 4)
    centers = rng.uniform(margin, size - margin, (num_sources, 2))
    fluxes = 10 ** rng.uniform(1.5, 3, num_sources)
    colors = rng.uniform(0.5, 1.5, (num_sources, len(CHANNELS)))
    sigmas = rng.uniform(2.0, 4.0, num_sources)
    image = rng.normal(0, NOISE, (len(CHANNELS), size, size))
    for (cy, cx), flux, color, sigma in zip(centers, fluxes, colors, sigmas, strict=True):
        y0, x0 = max(0, int(cy) - 24), max(0, int(cx) - 24)
        window = np.s_[y0 : int(cy) + 25, x0 : int(cx) + 25]
        y, x = np.mgrid[window][:, : size - y0, : size - x0]
        variance = sigma**2 + PSF_SIGMA**2
        profile = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2 / variance) / (2 * np.pi * variance)
        image[(slice(None), *window)] += flux * color[:, None, None] * profile
    return image, centers, fluxes[:, None] * colors


def round_gaussian(sigma):
    """Return a round Gaussian of peak 1 on a stamp of 31 pixels."""
    grid = np.arange(-HALF_STAMP, HALF_STAMP + 1)
    return np.exp(-(grid[:, None] ** 2 + grid**2) / 2 / sigma**2)


def build(num_sources, size):
    """Return the starting scene with its parameters, and the matched observation."""
    image, centers, spectra = simulate(num_sources, size)
    psf = round_gaussian(PSF_SIGMA)
    psf = np.tile(psf / psf.sum(), (len(CHANNELS), 1, 1))
    weights = np.full(image.shape, 1 / NOISE**2)
    observation = sc2.Observation(image, weights=weights, psf=psf, channels=CHANNELS)
    frame = sc2.Frame(sc2.Box(image.shape), psf=sc2.GaussianPSF(0.7), channels=CHANNELS)
    observation.match(frame)
    start = jnp.clip(jnp.asarray(round_gaussian(START_SIGMA), jnp.float32), 1e-6, 1 - 1e-6)
    with sc2.Scene(frame) as scene:
        for center, spectrum in zip(centers, spectra, strict=True):
            sc2.Source(jnp.asarray(center), jnp.asarray(spectrum / (2 * np.pi * START_SIGMA**2)), start)
    relative = partial(sc2.relative_step, factor=0.05)
    with sc2.Parameters(scene):
        for n, source in enumerate(scene.sources):
            sc2.Parameter(source.spectrum, name=f"spectrum:{n}", constraint=constraints.positive, stepsize=relative)
            sc2.Parameter(source.morphology, name=f"image:{n}", constraint=constraints.unit_interval, stepsize=0.1)
    return scene, observation


def main():
    """Fit a few steps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_sources", type=int)
    parser.add_argument("size", type=int, help="pixels along either side of the field")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    sc2.set_validation(False)
    start = time.perf_counter()
    scene, observation = build(options.num_sources, options.size)
    built = time.perf_counter()
    ends = []

    def note(*reported):
        # Reading the loss waits for the end of the step.
        float(reported[2])
        ends.append(time.perf_counter())

    sc2.fit(scene, [observation], max_iter=options.steps, e_rel=1e-9, progress_bar=False, callback=note)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    row = {
        "num_sources": options.num_sources,
        "size": options.size,
        "build_s": round(built - start, 3),
        "first_step_s": round(ends[0] - built, 3),
        "step_ms": round(1e3 * float(np.median(np.diff(ends))), 3),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
