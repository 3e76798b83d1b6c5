"""Linked bands: seconds for the three-band posterior of a Legacy Survey galaxy, and pysersic's for the same.

    python benchmarks/linked_bands.py [--check] [--nuts] [--peer-python PYTHON] [--json]

Data, mask and model are those of tutorials/04_linked_bands.py; needs its files in SCENEFIT_DATA. Fit, Laplace and SVI run
twice: the first time with compilation. `--nuts` adds No-U-Turn chains and compares the widths. `--check` fits every band
alone with GalSim and SciPy. `--peer-python` runs pysersic's Laplace and SVI (minutes) and says what flux its renderer gives
a profile of unit flux and index 0.7.
"""

import argparse
import importlib.util
import json
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import scipy.optimize

import scenefit as sf

HERE = Path(__file__).parent


def tutorial():
    """Return tutorials/04_linked_bands.py as a module."""
    spec = importlib.util.spec_from_file_location("linked", HERE.parent / "tutorials" / "04_linked_bands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_start(linked, observations):
    def quadratic(value):
        return sf.link.Polynomial.constant(value, 2, linked.WAVELENGTHS)

    morphology = sf.SersicMorphology(quadratic(5.0), quadratic(1.0), quadratic((0.05, 0.05)))
    frame = sf.Frame.from_observations(observations)
    return sf.Scene(frame, {"galaxy": sf.Source(linked.CENTER, [15.0, 25.0, 35.0], morphology)})


def run_ours(linked, observations, methods):
    """Return seconds by stage, the first time and the second, and the posteriors."""
    seconds, posteriors = {}, {}
    for _ in range(2):
        scene = make_start(linked, observations)
        parameters = sf.Parameters.default(scene, observations).free("observations.*.background")
        begin = time.perf_counter()
        result = sf.fit(scene, observations, parameters, progress=False)
        seconds.setdefault("fit", []).append(time.perf_counter() - begin)
        for name, options in methods.items():
            begin = time.perf_counter()
            method = name.split()[0]
            posteriors[name] = sf.sample(result, method, key=jax.random.key(0), progress=False, **options)
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
    return seconds, posteriors


def summary(linked, posterior):
    """Return mean and standard deviation by name and band."""
    draws = linked.measured(posterior)
    return {
        f"{name}_{band}": (float(values[:, n].mean()), float(values[:, n].std()))
        for name, values in draws.items()
        for n, band in enumerate(linked.WAVELENGTHS)
    }


def independent(observation):
    """Fit one band with GalSim's rendering and SciPy's least squares; return radius, index and 1 - q."""
    import galsim

    accuracy = galsim.GSParams(
        maxk_threshold=1e-4, kvalue_accuracy=1e-5, folding_threshold=2e-3, maximum_fft_size=20000
    )
    stamp = galsim.Image(np.ascontiguousarray(observation.psf.image[0]), scale=1.0)
    psf = galsim.InterpolatedImage(stamp, x_interpolant="lanczos5", gsparams=accuracy)
    data, weights = observation.data[0], observation.noise.weights[0]
    height, width = data.shape
    nu = observation.noise.degrees_of_freedom

    def residuals(parameters):
        flux, log_radius, index, e1, e2, dx, dy, sky = parameters
        profile = galsim.Sersic(
            n=float(np.clip(index, 0.35, 5)), half_light_radius=float(np.exp(log_radius)), flux=flux
        )
        profile = galsim.Convolve(profile.shear(e1=e1, e2=e2).shift(dx, dy), psf, gsparams=accuracy)
        image = profile.drawImage(nx=width, ny=height, scale=1.0, method="no_pixel", dtype=float).array + sky
        z = np.sqrt(weights) * (image - data)
        return (np.sign(z) * np.sqrt((nu + 1) * np.log1p(z**2 / (nu - 2)))).ravel()

    start = [data.sum(), np.log(6.0), 0.8, 0.3, -0.1, 58.42 - (width - 1) / 2, 62.36 - (height - 1) / 2, 0.0]
    scale = [0.01 * data.sum(), 0.01, 0.02, 0.01, 0.01, 0.02, 0.02, 1e-4]
    found = scipy.optimize.least_squares(residuals, start, x_scale=scale, diff_step=1e-4, xtol=1e-6).x
    norm = np.hypot(found[3], found[4])
    ratio = np.sqrt((1 - norm) / (1 + norm))
    return {"r_eff": np.exp(found[1]) / np.sqrt(ratio), "n": found[2], "ellip": 1 - ratio}


def run_peer(python, observations, linked, method):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        weights = np.stack([obs.noise.weights[0] for obs in observations])
        mask = (weights == 0).any(axis=0)
        np.savez(
            path,
            bands=list(linked.WAVELENGTHS),
            wavelengths=list(linked.WAVELENGTHS.values()),
            mask=mask,
            data=np.stack([obs.data[0] for obs in observations]),
            sigma=1 / np.sqrt(np.where(weights > 0, weights, np.median(weights))),
            psf=np.stack([obs.psf.image[0] for obs in observations]),
        )
        script = HERE / "peers" / "pysersic_linked.py"
        done = subprocess.run(
            [python, "-W", "ignore", script, path, method], capture_output=True, text=True, check=True
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--nuts", action="store_true")
    parser.add_argument("--peer-python")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    linked = tutorial()
    real = linked.real_galaxy()
    if real is None:
        return
    observations = real[0]
    methods = {"laplace": {}, "svi": {}, "svi flow": {"guide": "flow"}}
    seconds, posteriors = run_ours(linked, observations, methods)
    record = {"seconds": seconds, "posterior": {n: summary(linked, p) for n, p in posteriors.items()}}
    for name, (first, second) in seconds.items():
        print(f"{name:9s} first {first:7.2f} s, then {second:7.2f} s")
    if options.nuts:
        begin = time.perf_counter()
        nuts = sf.sample(posteriors["laplace"].result, "nuts", key=jax.random.key(1), progress=False)
        record["nuts_s"], record["nuts"] = time.perf_counter() - begin, summary(linked, nuts)
        print(f"nuts      {record['nuts_s']:.1f} s, compilation included; {nuts.status.value}: {nuts.message}")
        for name in methods:
            widths = [record["posterior"][name][key][1] / width for key, (_, width) in record["nuts"].items()]
            print(f"{name:9s} widths over those of nuts: {min(widths):.3f} to {max(widths):.3f}")
    if options.check:
        record["independent"] = {obs.name: independent(obs) for obs in observations}
        print("GalSim + SciPy:", {b: {k: round(v, 4) for k, v in f.items()} for b, f in record["independent"].items()})
    for method, own in (("laplace", "laplace"), ("svi-flow", "svi flow")) if options.peer_python else ():
        peer = record[f"pysersic {method}"] = run_peer(options.peer_python, observations, linked, method)
        warm = (seconds["fit"][1] + seconds[own][1]) / (peer["seconds"] - peer["compile_s"])
        cold = (seconds["fit"][0] + seconds[own][0]) / peer["seconds"]
        print(
            f"pysersic {method}: {peer['seconds']:.1f} s, of which {peer['compile_s']:.1f} s compiling; ours (fit and "
            f"{own}) takes {warm:.3f} of that with compilation apart, {cold:.3f} with it; its renderer makes "
            f"{peer['rendered_flux']:.3f} of a unit flux at n = 0.7"
        )
    if options.json:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
