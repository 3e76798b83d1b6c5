"""Many overlapping Sersic galaxies in one scene: time to converge from catalogue positions, and pulls.

    python benchmarks/crowded_profiles.py [--sources 30] [--size 256] [--fields 3] [--json]

Each field has that many galaxies at random in images of three bands, with half-light radii of 2 to 7 pixels, n of 0.7 to 4, axis
ratios down to 0.6, and a PSF of sigma 1.6 pixels. Fits start from positions that are off by 0.3 pixels, and from the same round
profile for all. The images are drawn by scenefit itself: `benchmarks/stamps.py` and the tests compare its images with GalSim's.
Each field is fitted twice: the second time nothing is compiled.
"""

import argparse
import json
import time

import numpy as np

import scenefit as sf

BANDS, PSF_SIGMA, START_ERROR, MARGIN = ("g", "r", "i"), 1.6, 0.3, 30


def make_field(num_sources, size, seed):
    """Return the true scene, the observations and a start."""
    rng = np.random.default_rng(seed)
    frame = sf.Frame((size, size), channels=BANDS, padding=24)
    sources, starts = {}, {}
    for number in range(num_sources):
        norm, angle = rng.uniform(0, 0.5), rng.uniform(0, 2 * np.pi)
        center, flux = rng.uniform(MARGIN, size - MARGIN, 2), 10 ** rng.uniform(2.2, 3.5) * rng.uniform(0.5, 1.5, 3)
        ellipticity = (norm * np.cos(angle), norm * np.sin(angle))
        morphology = sf.SersicMorphology(rng.uniform(2, 7), rng.uniform(0.7, 4), ellipticity)
        sources[str(number)] = sf.Source(center, flux, morphology)
        starts[str(number)] = sf.Source(
            center + rng.normal(0, START_ERROR, 2), np.full(3, 100.0), sf.SersicMorphology(3.0, 1.5)
        )
    scene = sf.Scene(frame, sources)
    observations = []
    for band in BANDS:
        kind = {"sigma": 1.0, "psf": sf.GaussianPSF(PSF_SIGMA), "channels": band, "name": band}
        clean = sf.Observation(np.zeros((size, size)), **kind).match(frame).render(scene)[0]
        observations.append(sf.Observation(clean + rng.normal(size=clean.shape), **kind))
    return scene, observations, sf.Scene(frame, starts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=30)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--fields", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, pulls = [], []
    for seed in range(options.fields):
        truth, observations, start = make_field(options.sources, options.size, seed)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            result = sf.fit(start, observations, progress=False)
            seconds.append(time.perf_counter() - begin)
        best = sf.fit(truth, observations, progress=False)
        errors = sf.parameter_errors(result)
        for name, source in truth.sources.items():
            flux = result.scene.sources[name].spectrum.flux
            pulls.append((flux - source.spectrum.flux) / errors[f"sources.{name}.spectrum.flux"])
        row = {
            "field": seed,
            "status": result.status.name,
            "steps": result.num_steps,
            "first_s": seconds[0],
            "compiled_s": seconds[1],
            "loss_above_fit_from_truth": result.loss - best.loss,
        }
        rows.append(row)
        print(
            f"field {seed}: {row['status']} after {row['steps']} steps, {seconds[0]:.1f} s, then {seconds[1]:.1f} s; loss "
            f"{row['loss_above_fit_from_truth']:+.2f} from that of the fit that starts at the truth",
            flush=True,
        )
    pulls = np.concatenate(pulls)
    low, middle, high = np.quantile(pulls, [0.16, 0.5, 0.84])
    width = 0.5 * (high - low)
    print(f"pulls of {len(pulls)} fluxes: median {middle:.3f}, width {width:.3f} (half of 16 to 84 %)")
    if options.json:
        print(json.dumps({"fields": rows, "pull_width": float(width)}))


if __name__ == "__main__":
    main()
