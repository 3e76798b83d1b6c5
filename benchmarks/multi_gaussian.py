"""Multi-Gaussian profile: least squares and posterior of imcascade's quickstart galaxy, and calibration over noise draws.

    python benchmarks/multi_gaussian.py [--draws 100] [--peer-python PYTHON] [--json]

A Sersic profile with n = 1.5 and a semi-major half-light radius of 6 pixels, axis ratio 0.7 and flux 250, on a tilted sky in
150x150 pixels of noise 0.01, behind a Moffat PSF; GalSim integrates it over pixels, so that the truth is analytic. Nine rings
with widths from 0.75 to 50 pixels along the major axis. Least squares and posterior run twice: the first time with
compilation. Then both run for every noise draw: the error of least squares; and pulls, (median - truth) / half the central
68 %, of the posterior. `--peer-python` runs imcascade's least squares and 'express' nested sampling on the same image (minutes).
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import galsim
import jax
import numpy as np
import scipy.special
from tqdm import tqdm

import scenefit as sf

HERE = Path(__file__).parent
SHAPE, SIGMA, FLUX, INDEX, RADIUS, RATIO = (150, 150), 0.01, 250.0, 1.5, 6.0, 0.7
CENTER, SLOPE = (75.0, 75.0), (-1e-4, 2e-4)
NUM_RINGS, WIDTHS = 9, (0.75, 50.0)
GALAXY, SKY = "sources.galaxy", "observations.i"
QUANTITIES = ("flux", "r20", "r50", "r80", "r90", "C80_20", "C90_50")
# What the fit should meet, in percent of the truth.
TARGETS = dict(zip(QUANTITIES, (0.5, 2.0, 1.0, 1.0, 2.0, 2.0, 2.0), strict=True))


def truth():
    """Return flux, semi-major radii and concentrations of the galaxy."""
    b = scipy.special.gammaincinv(2 * INDEX, 0.5)
    r20, r50, r80, r90 = (RADIUS * (scipy.special.gammaincinv(2 * INDEX, f) / b) ** INDEX for f in (0.2, 0.5, 0.8, 0.9))
    return dict(zip(QUANTITIES, (FLUX, r20, r50, r80, r90, r80 / r20, r90 / r50), strict=True))


def simulate():
    """Return the image without noise, the PSF by itself, and the PSF with the pixel."""
    accuracy = galsim.GSParams(
        folding_threshold=1e-4, maxk_threshold=1e-4, kvalue_accuracy=1e-6, maximum_fft_size=20000
    )
    y, x = np.mgrid[-15:16, -15:16]
    stamp = (1 + (x**2 + y**2) / 9.0) ** -3.0
    stamp /= stamp.sum()
    psf = galsim.InterpolatedImage(galsim.Image(stamp, scale=1.0), x_interpolant="lanczos5", gsparams=accuracy)
    psf_with_pixel = galsim.Convolve(galsim.Pixel(1.0), psf, gsparams=accuracy)
    galaxy = galsim.Sersic(INDEX, half_light_radius=RADIUS * np.sqrt(RATIO), flux=FLUX, gsparams=accuracy)
    seen = galsim.Convolve(galaxy.shear(q=RATIO, beta=0 * galsim.degrees), psf_with_pixel, gsparams=accuracy)
    middle = [(n - 1) / 2 for n in SHAPE]
    drawing = {"scale": 1.0, "method": "no_pixel", "dtype": float}
    image = seen.shift(CENTER[1] - middle[1], CENTER[0] - middle[0]).drawImage(nx=SHAPE[1], ny=SHAPE[0], **drawing)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    sky = (rows - CENTER[0]) * SLOPE[0] + (columns - CENTER[1]) * SLOPE[1]
    wide = psf_with_pixel.drawImage(nx=61, ny=61, **drawing).array
    return image.array + sky, stamp, wide / wide.sum()


def fit(data, psf):
    """Fit twice: for the size of the galaxy, then with the prior for rings of such a galaxy."""
    obs = sf.Observation(data, sigma=SIGMA, psf=sf.ImagePSF(psf, center=(30, 30)), channels="i", name="i")
    frame = sf.Frame.from_observations(obs)
    rings = sf.MultiGaussianMorphology.log_spaced(*(w * np.sqrt(RATIO) for w in WIDTHS), NUM_RINGS)
    scene = sf.Scene(frame, {"galaxy": sf.Source((74.5, 75.5), [200.0], rings)})
    parameters = sf.Parameters.default(scene, [obs]).free(f"{SKY}.background").free(f"{SKY}.background_slope")
    first = sf.fit(scene, obs, parameters, progress=False)
    profile = sf.profile(first, "galaxy")
    radius = float(profile.r50[0, 0] * np.sqrt(profile.axis_ratio[0, 0]))
    parameters = parameters.prior(f"{GALAXY}.morphology.amplitudes", sf.ring_prior(rings.sigmas, radius))
    return sf.fit(first.scene, first.observations, parameters, progress=False)


def measured(fitted):
    """Return draws of the quantities, shape (draw, quantity)."""
    p = sf.profile(fitted, "galaxy")
    return np.stack([each[:, 0] for each in (p.flux, p.r20, p.r50, p.r80, p.r90, p.c80_20, p.c90_50)], axis=1)


def timed(function, *args, **options):
    begin = time.perf_counter()
    value = function(*args, **options)
    return value, time.perf_counter() - begin


def noisy(clean, seed):
    return clean + SIGMA * np.random.default_rng(seed).normal(size=SHAPE)


def run(clean, psf, count):
    """Return errors of least squares in percent and pulls of the posterior, shape (draw, quantity), and how many were good."""
    reference, errors, pulls, good = np.array(list(truth().values())), [], [], 0
    for seed in tqdm(range(count), desc="noise draws"):
        result = fit(noisy(clean, seed), psf)
        posterior = sf.sample(result, "linear", key=jax.random.key(seed), progress=False)
        low, middle, high = np.quantile(measured(posterior), [0.16, 0.5, 0.84], axis=0)
        errors.append(100 * (measured(result)[0] / reference - 1))
        pulls.append((middle - reference) / (0.5 * (high - low)))
        good += result.is_converged and posterior.status is sf.PosteriorStatus.GOOD
    return np.array(errors), np.array(pulls), good


def run_peer(python, data, stamp):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        np.savez(path, data=data, psf=stamp, sigma=SIGMA)
        script = HERE / "peers" / "imcascade_profile.py"
        done = subprocess.run([python, "-W", "ignore", script, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def half_width(values):
    """Return half of the central 68 %."""
    low, high = np.quantile(values, [0.16, 0.84], axis=0)
    return 0.5 * (high - low)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--peer-python")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reference, (clean, stamp, psf) = truth(), simulate()
    seconds = {"least squares": [], "posterior": []}
    for seed in (1000, 1001):
        result, taken = timed(fit, noisy(clean, seed), psf)
        seconds["least squares"].append(taken)
        posterior, taken = timed(sf.sample, result, "linear", key=jax.random.key(0), progress=False)
        seconds["posterior"].append(taken)
    for name, (first, second) in seconds.items():
        print(f"{name:14s} first {first:6.2f} s, then {second:6.2f} s")
    print(f"{posterior.status.value}: {posterior.message}")
    print(f"log-evidence {posterior.log_evidence:.2f} +- {posterior.log_evidence_error:.2f}")
    errors, pulls, good = run(clean, psf, options.draws)
    print(f"{good} of {options.draws} fits converged with a good posterior")
    print(f"{'':8s}{'truth':>9s}{'bias %':>9s}{'scatter %':>10s}{'target %':>9s}{'pull mean':>11s}{'pull width':>11s}")
    for n, name in enumerate(QUANTITIES):
        print(
            f"{name:8s}{reference[name]:9.3f}{errors[:, n].mean():9.2f}{half_width(errors[:, n]):10.2f}{TARGETS[name]:9.1f}"
            f"{pulls[:, n].mean():11.2f}{half_width(pulls[:, n]):11.2f}"
        )
    record = {"seconds": seconds, "truth": reference, "errors_percent": errors.tolist(), "pulls": pulls.tolist()}
    if options.peer_python:
        peer = record["imcascade"] = run_peer(options.peer_python, noisy(clean, 1001), stamp)
        own = {name: taken[1] for name, taken in seconds.items()}
        print(
            f"imcascade: least squares {peer['least_squares_s']:.1f} s, 'express' sampling {peer['posterior_s']:.1f} s; "
            f"ours take {own['least squares'] / peer['least_squares_s']:.4f} and "
            f"{own['posterior'] / peer['posterior_s']:.4f} of that"
        )
        for name, (low, middle, high) in peer["quantiles"].items():
            ours = np.quantile(measured(posterior)[:, QUANTITIES.index(name)], [0.16, 0.5, 0.84])
            print(
                f"{name:8s} imcascade {middle:8.3f} -{middle - low:.3f} +{high - middle:.3f}; ours {ours[1]:8.3f} "
                f"-{ours[1] - ours[0]:.3f} +{ours[2] - ours[1]:.3f}; truth {reference[name]:.3f}"
            )
    if options.json:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
