"""Many stamps of single Sersic galaxies: seconds a galaxy, bias and pulls, beside AstroPhot and pysersic.

    python benchmarks/stamps.py [--number 1000] [--peer-number 32] [--peer-python PYTHON] [--pysersic-python PYTHON] [--json]

GalSim draws stamps of 64 x 64 pixels: PSF a Gaussian of FWHM 3.5 pixels, n 0.7 to 4, semi-major half-light radius 2 to 6
pixels, axis ratio 0.3 to 1, matched-filter signal-to-noise ratio 100. Starts are the flux and centroid of the stamp, a
radius of 3 pixels and n = 1.5. The time of `fit_many` counts packing and results; it runs twice, the first time with compilation.
`--peer-python` runs AstroPhot's Levenberg-Marquardt and `--pysersic-python` pysersic's search for the maximum of the posterior,
on the first `--peer-number` stamps, each with its own start.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import scenefit as sf

SIZE, FWHM, SNR = 64, 3.5, 100.0


def simulate(number, seed=6):
    """Return stamps, the PSF with the pixel in it, and the truth."""
    import galsim

    accuracy = galsim.GSParams(
        folding_threshold=1e-4, maxk_threshold=1e-4, kvalue_accuracy=1e-6, maximum_fft_size=20000
    )
    rng, psf = np.random.default_rng(seed), galsim.Gaussian(fwhm=FWHM)
    truth = {name: np.zeros(number) for name in ("n", "radius", "ratio", "y", "x", "flux")}
    stamps = np.zeros((number, SIZE, SIZE))
    for n in range(number):
        index, radius, ratio = rng.uniform(0.7, 4.0), rng.uniform(2.0, 6.0), rng.uniform(0.3, 1.0)
        dx, dy = rng.uniform(-0.5, 0.5, 2)
        profile = galsim.Sersic(n=round(index, 2), half_light_radius=radius * np.sqrt(ratio), gsparams=accuracy)
        profile = profile.shear(q=ratio, beta=rng.uniform(0, 180) * galsim.degrees).shift(dx, dy)
        image = (
            galsim.Convolve(profile, psf, gsparams=accuracy).drawImage(nx=SIZE, ny=SIZE, scale=1.0, dtype=float).array
        )
        flux = SNR / np.sqrt((image**2).sum())
        stamps[n] = flux * image + rng.normal(size=image.shape)
        middle = (SIZE - 1) / 2
        for name, value in zip(truth, (round(index, 2), radius, ratio, middle + dy, middle + dx, flux), strict=True):
            truth[name][n] = value
    kernel = psf.drawImage(nx=25, ny=25, scale=1.0, dtype=float).array
    return stamps, kernel / kernel.sum(), truth


def start(frame, stamp):
    y, x = np.mgrid[:SIZE, :SIZE]
    weight = stamp * np.exp(-((y - 31.5) ** 2 + (x - 31.5) ** 2) / 128)
    center = (weight * y).sum() / weight.sum(), (weight * x).sum() / weight.sum()
    return sf.Scene(frame, {"galaxy": sf.Source(center, [max(stamp.sum(), 10.0)], sf.SersicMorphology(3.0, 1.5))})


def fit_all(stamps, kernel):
    """Return results, and seconds a galaxy from arrays to results."""
    begin = time.perf_counter()
    psf = sf.ImagePSF(kernel)
    observations = [sf.Observation(stamp, sigma=1.0, psf=psf, channels="i", name="stamp") for stamp in stamps]
    frame = sf.Frame.from_observations(observations[0])
    results = sf.fit_many([start(frame, stamp) for stamp in stamps], observations, progress=False)
    return results, (time.perf_counter() - begin) / len(stamps)


def judge(results, truth):
    """Return median and robust scatter of deviations and pulls."""
    pulls, deviations = {}, {}
    for n, result in enumerate(results):
        source, errors = result.scene.sources["galaxy"], sf.parameter_errors(result)
        morphology, base = source.morphology, "sources.galaxy."
        norm = np.hypot(*morphology.ellipticity)
        ratio = np.sqrt((1 - norm) / (1 + norm))
        circular = truth["radius"][n] * np.sqrt(truth["ratio"][n])
        rows = {
            "flux": (source.spectrum.flux[0], truth["flux"][n], errors[base + "spectrum.flux"][0]),
            "radius": (float(morphology.half_light_radius), circular, errors[base + "morphology.half_light_radius"]),
            "n": (float(morphology.sersic_index), truth["n"][n], errors[base + "morphology.sersic_index"]),
            "x": (source.center[1], truth["x"][n], errors[base + "center"][1]),
        }
        for name, (value, true, error) in rows.items():
            pulls.setdefault(name, []).append((value - true) / float(error))
        deviations.setdefault("magnitude", []).append(-2.5 * np.log10(source.spectrum.flux[0] / truth["flux"][n]))
        deviations.setdefault("radius", []).append(float(morphology.half_light_radius) / circular - 1)
        deviations.setdefault("n", []).append(float(morphology.sersic_index) / truth["n"][n] - 1)
        deviations.setdefault("axis ratio", []).append(ratio - truth["ratio"][n])

    def robust(values):
        middle = float(np.median(values))
        return middle, float(1.4826 * np.median(np.abs(np.array(values) - middle)))

    return {name: robust(v) for name, v in deviations.items()}, {name: robust(v) for name, v in pulls.items()}


def run_peer(python, script, stamps, kernel):
    """Return what a script of peers/ prints for some stamps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stamps.npz"
        np.savez(path, stamps=stamps, psf=kernel)
        command = [python, "-W", "ignore", str(Path(__file__).parent / "peers" / script), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_pysersic(first, second, peer, truth):
    """Print pysersic's seconds and errors; the first stamp, with which it starts up, doesn't count."""
    whole, compiled = (np.array(peer[name][1:]) for name in ("seconds", "compile_s"))
    alone, together = float(np.median(whole - compiled)), float(np.median(whole))
    print(
        f"pysersic: {1e3 * together:.0f} ms a galaxy (median), {1e3 * alone:.0f} ms without compilation; ours "
        f"{second / alone:.4f} of the latter, and with compilation on both sides {first / together:.4f}"
    )
    magnitude = -2.5 * np.log10(np.array(peer["flux"]) / truth["flux"][: len(peer["flux"])])
    index = np.array(peer["n"]) / truth["n"][: len(peer["n"])] - 1
    print(f"its median errors: {np.median(magnitude):.4f} mag, {100 * np.median(index):.2f} % of n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--peer-number", type=int, default=32)
    parser.add_argument("--peer-python")
    parser.add_argument("--pysersic-python")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stamps, kernel, truth = simulate(options.number)
    _, first = fit_all(stamps, kernel)
    results, second = fit_all(stamps, kernel)
    print(f"{options.number} stamps: {1e3 * first:.1f} ms a galaxy the first time, {1e3 * second:.1f} ms the second")
    statuses = [result.status.name for result in results]
    print({name: statuses.count(name) for name in sorted(set(statuses))})
    deviations, pulls = judge(results, truth)
    for title, table in (("deviation", deviations), ("pull", pulls)):
        for name, (middle, scatter) in table.items():
            print(f"{title} of {name:10s} median {middle:8.4f}, scatter {scatter:.4f}")
    record = {"first_s": first, "second_s": second, "deviations": deviations, "pulls": pulls}
    few = stamps[: options.peer_number], kernel
    if options.peer_python:
        record["astrophot"] = peer = run_peer(options.peer_python, "astrophot_stamps.py", *few)
        print(
            f"AstroPhot: {1e3 * peer['seconds']:.0f} ms a galaxy (median); ours {second / peer['seconds']:.3f} of that"
        )
    if options.pysersic_python:
        record["pysersic"] = peer = run_peer(options.pysersic_python, "pysersic_stamps.py", *few)
        compare_pysersic(first, second, peer, truth)
    if options.json:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
