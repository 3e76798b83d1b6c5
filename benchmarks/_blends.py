"""Simulated blends that several benchmarks take: files that exist, or drawn by a script."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import numpyro.distributions as dist
from astropy.coordinates import SkyCoord
from scipy.optimize import linear_sum_assignment

import scenefit as sf
from scenefit.model.parameters import ENVELOPE_SCATTER

RADIUS = 0.15
"""Distance in arcsec within which a source is found."""
SIGMA, KERNEL = 0.010, np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
"""Noise of a pixel of the space camera, and the kernel that correlates it."""
SEPARATION, LEAST_SNR = 0.3, 20.0
"""Sources that a detection has to find are farther than this from others, in arcsec, and more significant in the space camera."""


def add_blends(parser: argparse.ArgumentParser):
    """Add the options that say which blends to take."""
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="files, or folders of files, of simulated blends")
    parser.add_argument("--fields", type=int, default=20, help="blends to simulate if there are no files")
    parser.add_argument("--simulator", type=pathlib.Path, help="script that draws them")
    parser.add_argument("--first-seed", type=int, default=100, help="of the blends to simulate")


def blends(parser: argparse.ArgumentParser, arguments: argparse.Namespace, folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of the blends that the options name, drawn into a folder if they aren't there.

    Without files and simulator there is nothing to measure: it says so on standard error, and the script ends without failure,
    so that those that run all benchmarks can go on.
    """
    paths = sorted(p for path in arguments.paths for p in (path.glob("*.fits") if path.is_dir() else [path]))
    if paths:
        return paths
    if arguments.paths:
        parser.error(f"no FITS file in {', '.join(map(str, arguments.paths))}")
    if arguments.simulator is None:
        parser.exit(0, f"{parser.prog}: skipped. Give files of simulated blends, or --simulator.\n")
    return simulate(arguments.simulator, folder, range(arguments.first_seed, arguments.first_seed + arguments.fields))


def simulate(simulator: pathlib.Path, folder: pathlib.Path, seeds: range) -> list[pathlib.Path]:
    """Draw blends."""
    paths = []
    for seed in seeds:
        paths.append(folder / f"blend{seed}.fits")
        options = [
            "--seed",
            seed,
            "--sources",
            4 + seed % 6,
            "--size",
            7.5,
            "--correlated",
            "--rotate",
            23 * (seed % 2),
        ]
        command = [sys.executable, simulator, paths[-1], *options, "--offset", 0.03, -0.02]
        subprocess.run([str(each) for each in command], check=True, stdout=subprocess.DEVNULL)
    return paths


def with_prior_width(parameters: sf.Parameters, scene: sf.Scene, width: float) -> sf.Parameters:
    """Return the parameters with priors of free pixels of another standard deviation, in units of their envelope."""
    for name in scene.sources:
        path = f"sources.{name}.morphology.image"
        prior = parameters.table[path].prior
        parameters = parameters.prior(path, dist.Normal(prior.loc, width / ENVELOPE_SCATTER * prior.scale))
    return parameters


def pairs(truth: SkyCoord, found: SkyCoord) -> np.ndarray:
    """Return the number of the detection of each source, -1 for none."""
    result = np.full(len(truth), -1)
    if len(found):
        distance = truth[:, None].separation(found[None, :]).arcsec
        rows, columns = linear_sum_assignment(np.where(distance < RADIUS, distance, 1e3))
        near = distance[rows, columns] < RADIUS
        result[rows[near]] = columns[near]
    return result


def is_wanted(truth: SkyCoord, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which sources a detection has to find, and their signal to noise, from their images in the space camera."""
    snr = np.sqrt((np.asarray(images, float) ** 2).sum(axis=(1, 2)) * (KERNEL**2).sum()) / SIGMA
    apart = truth[:, None].separation(truth[None, :]).arcsec + 1e3 * np.eye(len(truth))
    return (snr > LEAST_SNR) & (apart.min(axis=1) > SEPARATION), snr
