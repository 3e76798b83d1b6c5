"""Forced photometry of a crowded field in many epochs, beside the algebra alone.

    python benchmarks/forced_photometry.py --sources 100 --epochs 200 --json

Shapes and positions of the sources are known. Every epoch has a pointing, an orientation, a PSF image and a depth of its own.
The time once compiled is that of a whole call, host work and table included, on observations that aren't matched. The bare lower
bound, measured in the same run, is dense least squares in NumPy with templates that are already rendered, in single and double
precision.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from astropy.wcs import WCS

import scenefit as sf

PIXEL_ARCSEC, SIZE = 0.2, 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side of an epoch")
    parser.add_argument("--parallel", action="store_true", help="dithers alone, no rotations")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    observations = [make_epoch(rng, number, args.size, args.parallel) for number in range(args.epochs)]
    scene = make_scene(rng, args.sources, args.size)
    begin = time.perf_counter()
    sf.forced_photometry(scene, observations[:2], progress=False)
    first = time.perf_counter() - begin
    # Windows that serve all epochs may be larger than those that serve two.
    begin = time.perf_counter()
    photometry = sf.forced_photometry(scene, observations, progress=False)
    second = time.perf_counter() - begin
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        photometry = sf.forced_photometry(scene, observations, progress=False)
        seconds.append(time.perf_counter() - begin)
    best = min(seconds)
    bounds = {str(kind.__name__): bare_seconds(rng, args, kind) for kind in (np.float32, np.float64)}
    report = {
        "sources": args.sources,
        "epochs": args.epochs,
        "pixels": args.size**2,
        "seconds": best,
        "seconds_all": seconds,
        "milliseconds_per_epoch": 1e3 * best / args.epochs,
        "compile_seconds": max(first, second - best),
        "bare_milliseconds_per_epoch": {kind: 1e3 * value for kind, value in bounds.items()},
        "ratio_to_bare": {kind: best / args.epochs / value for kind, value in bounds.items()},
        "rows": len(photometry.table),
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for key, value in report.items():
        print(f"{key}: {value}")


def bare_seconds(rng: np.random.Generator, args, dtype) -> float:
    """Return the seconds of a weighted least-squares solution with its covariance, the templates given."""
    design = rng.normal(size=(args.sources + 1, args.size**2)).astype(dtype)
    data, weights = rng.normal(size=args.size**2).astype(dtype), np.ones(args.size**2, dtype)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        weighted = design * weights
        covariance = np.linalg.inv(weighted @ design.T)
        covariance @ (weighted @ data)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def make_scene(rng: np.random.Generator, count: int, size: int) -> sf.Scene:
    """Return galaxies and stars all over the field that all epochs see."""
    frame = sf.Frame((size + 20, size + 20), channels=["r"], wcs=make_wcs(size + 20, 0.0, (0.0, 0.0)), padding=24)
    sources = {}
    for number in range(count):
        center = rng.uniform(14, size + 6, size=2)
        if number % 3:
            shape = sf.ExponentialMorphology(rng.uniform(1.0, 3.0), rng.uniform(-0.4, 0.4, size=2))
        else:
            shape = sf.PointMorphology()
        sources[f"s{number}"] = sf.Source(center, [1.0], shape)
    return sf.Scene(frame, sources)


def make_epoch(rng: np.random.Generator, number: int, size: int, parallel: bool) -> sf.Observation:
    """Return an epoch of noise alone: what is solved for doesn't change the time."""
    angle = 0.0 if parallel else rng.uniform(-20, 20)
    wcs = make_wcs(size, angle, rng.uniform(-2, 2, size=2))
    y, x = np.mgrid[-15:16, -15:16]
    radius, stretch = rng.uniform(1.6, 2.4), rng.uniform(0.85, 1.15)
    psf = np.exp(-((y * stretch) ** 2 + (x / stretch) ** 2) / (2 * radius**2))
    sigma = rng.uniform(0.8, 1.5)
    return sf.Observation(
        rng.normal(scale=sigma, size=(size, size)),
        sigma=sigma,
        psf=psf,
        wcs=wcs,
        channels=[("r", number)],
        name=f"epoch{number}",
        zeropoint=31.4,
    )


def make_wcs(size: int, angle_deg: float, offset) -> WCS:
    """Return a tangent plane turned by an angle about the field, moved by some pixels (y, x)."""
    angle = np.deg2rad(angle_deg)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [(size + 1) / 2 + offset[1], (size + 1) / 2 + offset[0]]
    turn = np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = PIXEL_ARCSEC / 3600 * turn
    return wcs


if __name__ == "__main__":
    main()
