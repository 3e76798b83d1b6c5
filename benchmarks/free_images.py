"""What free images recover of a galaxy and its neighbour: pixels or starlets, with and without an envelope.

    python free_images.py [--fields 3] [--depths 7 50] [--json]

A late-type galaxy of an inclined exponential disk and knots along two arms, and a smooth neighbour that overlaps it, in two
bands with different colors and a PSF of 3.6 pixels (FWHM); drawn by GalSim, which knows nothing of model pixels. Each depth
is the signal of the galaxy's brightest pixel over the noise. All fits start from `initialize`. Columns: root mean square
error of the galaxy's image through the PSF, as a fraction of the root mean square of the true one; errors of both sources'
fluxes in per cent (root mean square over fields and bands); and of a fit the median of its seconds, steps, and products: pairs of
a forward and an adjoint rendering. The first fit of a kind includes compilation.
"""

from __future__ import annotations

import argparse
import json
import warnings

import galsim
import numpy as np

import scenefit as sf

SHAPE, FWHM = (80, 80), 3.6
CENTERS = np.array([[39.0, 34.0], [47.0, 56.0]])
FLUXES = np.array([[1.0, 1.6], [0.45, 0.25]])
KINDS = ("pixels", "pixels, envelope", "starlets", "starlets, envelope")
FIRST_SEED = 100
"""The widths of the priors of starlets were chosen on fields with smaller ones."""


def galaxy(rng: np.random.Generator) -> galsim.GSObject:
    """Return a disk with knots along two spiral arms, of unit flux."""
    disk = galsim.Exponential(half_light_radius=7.0)
    knots = []
    for arm in range(2):
        for turn in rng.uniform(0.3, 2.6, 9):
            radius = 3.5 * np.exp(0.45 * turn)
            angle = turn + np.pi * arm + rng.normal(0, 0.1)
            knot = galsim.Gaussian(half_light_radius=rng.uniform(0.5, 1.5), flux=rng.uniform(0.5, 1.5))
            knots.append(knot.shift(radius * np.cos(angle), radius * np.sin(angle)))
    arms = galsim.Sum(knots)
    whole = disk * 0.65 + arms.withFlux(0.35)
    return whole.shear(q=0.65, beta=rng.uniform(0, np.pi) * galsim.radians)


def neighbour(rng: np.random.Generator) -> galsim.GSObject:
    """Return a smooth elliptical of unit flux."""
    return galsim.Sersic(2.0, half_light_radius=4.0).shear(q=0.8, beta=rng.uniform(0, np.pi) * galsim.radians)


def simulate(seed: int, depth: float) -> tuple[sf.Observation, np.ndarray]:
    """Return a noisy observation, and the sources' noise-free images (source, channel, y, x)."""
    rng = np.random.default_rng(seed)
    psf = galsim.Moffat(beta=3.5, fwhm=FWHM)
    truth = np.zeros((2, 2, *SHAPE))
    for n, profile in enumerate((galaxy(rng), neighbour(rng))):
        seen = galsim.Convolve(profile, psf)
        # GalSim's middle lies at (SHAPE - 1) / 2, counted from zero.
        dy, dx = CENTERS[n] - (np.array(SHAPE) - 1) / 2
        plane = galsim.Image(SHAPE[1], SHAPE[0], dtype=float)
        seen.shift(dx, dy).drawImage(plane, scale=1.0)
        truth[n] = FLUXES[n][:, None, None] * plane.array
    sigma = truth[0].max(axis=(1, 2)) / depth
    data = truth.sum(axis=0) + sigma[:, None, None] * rng.standard_normal(truth.shape[1:])
    kernel = psf.drawImage(nx=41, ny=41, scale=1.0).array.astype(float)
    observation = sf.Observation(data, sigma=sigma, psf=sf.ImagePSF(kernel), channels=("g", "r"), name="camera")
    return observation, truth


def start(kind: str, frame: sf.Frame, observation: sf.Observation) -> sf.Scene:
    """Return the scene to fit."""
    scene = sf.initialize(frame, observation, CENTERS, model="pixel", progress=False)
    sources = {}
    for name, source in scene.sources.items():
        image, anchor = source.morphology.image, source.morphology.anchor
        envelope = image if "envelope" in kind else None
        if "pixels" in kind:
            morphology = sf.PixelMorphology(image, anchor, envelope)
        else:
            morphology = sf.StarletMorphology.from_image(image, anchor=anchor, envelope=envelope)
        sources[name] = sf.Source(source.center, source.spectrum, morphology)
    return sf.Scene(frame, sources)


def measure(kind: str, observation: sf.Observation, truth: np.ndarray) -> dict:
    """Return the errors of a fit."""
    frame = sf.Frame.from_observations(observation)
    result = sf.fit(start(kind, frame, observation), observation, progress=False)
    (fitted,) = result.observations
    flux = np.array([source.spectrum.evaluate(frame.channels) for source in result.scene.sources.values()])
    first = dict(list(result.scene.sources.items())[:1])
    image = fitted.render(sf.Scene(frame, first)) - fitted.background_image()
    return {
        "kind": kind,
        "status": result.status.name,
        "image": float(np.sqrt(np.mean((image - truth[0]) ** 2) / np.mean(truth[0] ** 2))),
        "flux": (100 * (flux[0] / truth[0].sum(axis=(1, 2)) - 1)).tolist(),
        "neighbour": (100 * (flux[1] / truth[1].sum(axis=(1, 2)) - 1)).tolist(),
        "seconds": result.timing["fit"],
        "steps": result.num_steps,
        "products": int(result.history["products"][-1]),
    }


def main():
    """Print a row for each depth and kind of image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=3)
    parser.add_argument("--depths", type=float, nargs="+", default=[7.0, 50.0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*leap-second.*")
    print(
        f"{'depth':>6}  {'kind':20}{'image':>8}{'flux':>8}{'neighbour':>11}{'seconds':>9}{'steps':>7}{'products':>10}"
    )
    for depth in options.depths:
        fields = [simulate(seed, depth) for seed in range(FIRST_SEED, FIRST_SEED + options.fields)]
        for kind in KINDS:
            rows = [measure(kind, *field) for field in fields]
            image, flux, other = (
                np.sqrt(np.mean(np.square([row[name] for row in rows]))) for name in ("image", "flux", "neighbour")
            )
            seconds, steps, products = (
                np.median([row[name] for row in rows]) for name in ("seconds", "steps", "products")
            )
            unfinished = sum(row["status"] != "CONVERGED" for row in rows)
            print(
                f"{depth:6.0f}  {kind:20}{image:8.3f}{flux:8.2f}{other:11.2f}{seconds:9.2f}{steps:7.0f}{products:10.0f}"
                + (f"  {unfinished} not converged" if unfinished else ""),
                flush=True,
            )
            if options.json:
                print(json.dumps(rows))


if __name__ == "__main__":
    main()
