"""Peer: first step and step of scarlet2 on a field of many sources; run in its own environment (`scarlet2==0.5.1`).

    python scarlet2_scaling.py FIELD.npz [--steps 30]

The field is one of benchmarks/scaling.py, which writes the file. Every source starts from a
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

HALF_STAMP, START_SIGMA = 15, 3.0


def round_gaussian(sigma):
    """Return a round Gaussian of peak 1 on a stamp of 31 pixels."""
    grid = np.arange(-HALF_STAMP, HALF_STAMP + 1)
    return np.exp(-(grid[:, None] ** 2 + grid**2) / 2 / sigma**2)


def build(field):
    """Return the starting scene with its parameters, and the matched observation."""
    image, channels = field["data"], [str(channel) for channel in field["channels"]]
    psf = np.tile(field["psf"], (len(channels), 1, 1))
    weights = np.full(image.shape, 1 / float(field["sigma"]) ** 2)
    observation = sc2.Observation(image, weights=weights, psf=psf, channels=channels)
    frame = sc2.Frame(sc2.Box(image.shape), psf=sc2.GaussianPSF(0.7), channels=channels)
    observation.match(frame)
    start = jnp.clip(jnp.asarray(round_gaussian(START_SIGMA), jnp.float32), 1e-6, 1 - 1e-6)
    with sc2.Scene(frame) as scene:
        for center, spectrum in zip(field["centers"], field["fluxes"], strict=True):
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
    parser.add_argument("field", help="npz file that benchmarks/scaling.py writes")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    sc2.set_validation(False)
    start = time.perf_counter()
    scene, observation = build(dict(np.load(options.field)))
    built = time.perf_counter()
    ends = []

    def note(*reported):
        # Reading the loss waits for the end of the step.
        float(reported[2])
        ends.append(time.perf_counter())

    sc2.fit(scene, [observation], max_iter=options.steps, e_rel=1e-9, progress_bar=False, callback=note)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    row = {
        "num_sources": len(scene.sources),
        "size": observation.data.shape[-1],
        "build_s": round(built - start, 3),
        "first_step_s": round(ends[0] - built, 3),
        "step_ms": round(1e3 * float(np.median(np.diff(ends))), 3),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
