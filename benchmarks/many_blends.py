"""Many blends in one process: what is compiled after the first one, and how much memory grows.

    python many_blends.py [--blends 200] [--sources 5 6] [--coverage union] [--turn 0] [--priors] [--json]

Every blend is drawn anew from its own seed: another place on the sky, other Gaussian galaxies, and other sub-pixel
positions of the second image on the first. Two observations see it: one channel of 100 x 100 fine pixels and three
channels of 38 x 38 coarse ones, with the offset of the coarse image free. `sf.initialize`, `sf.fit`, `sf.catalog` and
`offset_errors` are run on each.

One padded shape means: the same channels and sizes of the images, the same padded canvas of the model frame, the same
padded number and size of the stamps, and for each image the same rounded number of Fourier modes and size of the part
that is rendered. `sf.initialize` gets one `half_size`, and the default numbers of sources, 5 and 6, are both padded to 6.
(4 stays 4 and 7 becomes 8: `--sources 4 7` shows what other numbers cost.) A blend whose stamps grow during the fit has
another padded size at its end; this counts as another shape.

The size of the frame varies by a pixel from blend to blend, as the coarse pixels fall on the fine ones; with these
images it is padded to one canvas. `--turn DEGREES` turns the coarse image by a random angle up to this one, which makes
the frame and the numbers of modes vary more, and `--coverage intersection` makes the frame cut off its edges: both give
a few shapes, not one a blend. With `--priors` every source gets a prior on its center and on its fluxes.

The table has a row every 20 blends: how many different shapes there were so far, the number of compilations since the
row before (those of the first blend left out), the resident memory, and the median time of a blend. The end says which
functions were compiled after the first blend, and how often in a blend of a shape that wasn't new.

Memory is that of the whole process, in units of 2**20 bytes: resident memory where the system tells it (Linux), else
its peak. Growth is that from blend 20 to the last one: what the first blends allocate and compile is left out.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import numpyro.distributions as dist
from astropy.wcs import WCS

import scenefit as sf
from scenefit.model.packing import pack

COMPILED = "/jax/core/compile/backend_compile_duration"
ROW_BLENDS = 20
HALF_SIZE = 12
FIELD_ARCSEC = 6.0
MIN_SEPARATION_ARCSEC = 0.5


@dataclass(frozen=True)
class Camera:
    """An imager with square pixels and a round Gaussian PSF, its sigma in pixels; `noise` is that of a pixel."""

    channels: tuple[str, ...]
    num_pixels: int
    scale_arcsec: float
    psf_sigma: float
    noise: float


FINE = Camera(("v",), 100, 0.06, 1.3, 0.05)
COARSE = Camera(("g", "r", "i"), 38, 0.19, 1.5, 0.3)


class Compilations:
    """Counts the compilations of this process from now on, by stage and by function."""

    def __init__(self):
        self.stage, self.counts = "", collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, _: float, **details):
        if event == COMPILED:
            self.counts[self.stage, str(details.get("fun_name", "unnamed"))] += 1

    def take(self) -> collections.Counter:
        """Return the counts since the last call by (stage, function)."""
        counts, self.counts = self.counts, collections.Counter()
        return counts


@dataclass(frozen=True)
class Blend:
    """What one fit did: its padded shapes, seconds, compilations, status and the memory after it."""

    shape: tuple
    seconds: float
    compiled: collections.Counter
    is_converged: bool
    resident_mb: float


def resident_mb() -> float:
    """Return the resident memory of this process in MB; its peak where the system doesn't tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    return pages * resource.getpagesize() / 2**20


def gaussian(num_pixels: int, center, variance: float) -> np.ndarray:
    """Return a round Gaussian of unit integral on a square image; center (y, x) in pixels."""
    y, x = np.mgrid[:num_pixels, :num_pixels]
    return np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / 2 / variance) / (2 * np.pi * variance)


def place_galaxies(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return positions (west, north) in arcsec from the middle of the field, no two of them too close."""
    positions = np.zeros((0, 2))
    while len(positions) < count:
        trial = rng.uniform(-0.3 * FIELD_ARCSEC, 0.3 * FIELD_ARCSEC, 2)
        if np.all(np.hypot(*(positions - trial).T) > MIN_SEPARATION_ARCSEC):
            positions = np.vstack([positions, trial])
    return positions


def make_wcs(camera: Camera, center_deg, offset, angle_rad: float) -> WCS:
    """Return the WCS of an image; `offset` is the pixel position (x, y) of the field's centre minus the middle's."""
    turn = np.array([[np.cos(angle_rad), -np.sin(angle_rad)], [np.sin(angle_rad), np.cos(angle_rad)]])
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = center_deg
    wcs.wcs.crpix = (camera.num_pixels + 1) / 2 + offset
    wcs.wcs.cd = camera.scale_arcsec / 3600 * np.diag([-1.0, 1.0]) @ turn
    wcs.wcs.radesys = "ICRS"
    return wcs


def simulate(seed: int, counts: tuple[int, int], turn_deg: float) -> tuple[list[sf.Observation], np.ndarray]:
    """Draw a blend.

    Parameters
    ----------
    seed : int
    counts : (int, int)
        Fewest and most galaxies.
    turn_deg : float
        Largest angle between the axes of the two images.

    Returns
    -------
    observations : list of Observation
        The fine and the coarse one.
    centers : array, shape (n, 2)
        True positions (y, x) on the pixels of the fine one.
    """
    rng = np.random.default_rng(seed)
    center_deg = rng.uniform((140.0, -30.0), (220.0, 30.0))
    positions = place_galaxies(rng, rng.integers(counts[0], counts[1], endpoint=True))
    sigmas = rng.uniform(0.12, 0.25, len(positions))
    brightness = 10 ** rng.uniform(1.3, 2.3, len(positions))
    observations = []
    for name, camera in {"fine": FINE, "coarse": COARSE}.items():
        size, scale, num_channels = camera.num_pixels, camera.scale_arcsec, len(camera.channels)
        offset = np.zeros(2) if camera is FINE else rng.uniform(-0.5, 0.5, 2)
        angle = 0.0 if camera is FINE else np.deg2rad(rng.uniform(-turn_deg, turn_deg))
        wcs = make_wcs(camera, center_deg, offset, angle)
        # (x, y) in pixels: the inverse of the turn takes (west, north) to the axes of the image.
        inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
        pixels = positions @ inverse.T + (size - 1) / 2 + offset
        fluxes = brightness * rng.uniform(0.5, 1.5, (num_channels, len(positions)))
        image = rng.normal(0, camera.noise, (num_channels, size, size))
        for pixel, sigma, flux in zip(pixels, sigmas, fluxes.T, strict=True):
            image += flux[:, None, None] * gaussian(size, pixel[::-1], (sigma / scale) ** 2 + camera.psf_sigma**2)
        psf = gaussian(21, (10, 10), camera.psf_sigma**2)
        options = {"sigma": camera.noise, "psf": psf, "wcs": wcs, "channels": camera.channels, "name": name}
        observations.append(sf.Observation(image, **options))
    return observations, (positions / FINE.scale_arcsec + (FINE.num_pixels - 1) / 2)[:, ::-1]


def padded_shape(scene: sf.Scene, observations: Sequence[sf.Observation]) -> tuple:
    """Return the shape of the padded canvas, modes and window of every matched image, and the shape of every stack."""
    stacks, _ = pack(scene.frame, list(scene.components()))
    renderers = [observation.matched_renderer for observation in observations]
    rendered = tuple((renderer.num_modes, renderer.window.shape) for renderer in renderers)
    return scene.frame.fft_shape, rendered, tuple(stack.mask.shape for stack in stacks)


def with_priors(parameters: sf.Parameters, scene: sf.Scene) -> sf.Parameters:
    """Return the parameters with a wide prior around the start on the center and the fluxes of every source."""
    for path, source in scene.components():
        flux = np.maximum(source.spectrum.flux, 1.0)
        parameters = parameters.prior(f"{path}.center", dist.Normal(source.center, 2.0))
        parameters = parameters.prior(f"{path}.spectrum.flux", dist.LogNormal(np.log(flux), 1.0))
    return parameters


def fit_blend(seed: int, options: argparse.Namespace, compilations: Compilations) -> Blend:
    """Draw and fit a blend."""
    observations, centers = simulate(seed, options.sources, options.turn)
    start = time.perf_counter()
    compilations.stage = "start"
    frame = sf.Frame.from_observations(observations, options.coverage)
    positions = observations[0].wcs.pixel_to_world(centers[:, 1], centers[:, 0])
    scene = sf.initialize(frame, observations, positions, model="pixel", half_size=HALF_SIZE)
    parameters = sf.Parameters.default(scene, observations).free("observations.coarse.astrometry.shift")
    if options.priors:
        parameters = with_priors(parameters, scene)
    compilations.stage = "fit"
    result = sf.fit(scene, observations, parameters, progress=False)
    compilations.stage = "catalog"
    sf.catalog(result)
    compilations.stage = "offset_errors"
    sf.offset_errors(result)
    seconds, compiled = time.perf_counter() - start, compilations.take()
    shape = tuple(padded_shape(each, result.observations) for each in (scene, result.scene))
    compilations.take()  # those of `padded_shape` don't count
    return Blend(shape, seconds, compiled, result.is_converged, resident_mb())


def print_row(blends: list[Blend]):
    """Print the row of the table that ends with the last blend."""
    first = (len(blends) - 1) // ROW_BLENDS * ROW_BLENDS
    new = blends[max(first, 1) :]
    print(
        f"{len(blends):>6}{len({blend.shape for blend in blends}):>8}"
        f"{sum(blend.compiled.total() for blend in new):>14}{blends[-1].resident_mb:>10.0f} MB"
        f"{np.median([blend.seconds for blend in new or blends]):>9.2f} s",
        flush=True,
    )


def summarize(blends: list[Blend]) -> dict:
    """Return the figures of all blends."""
    later, known, repeated = blends[1:], {blends[0].shape}, 0
    for blend in later:
        repeated += blend.compiled.total() if blend.shape in known else 0
        known.add(blend.shape)
    compiled = sum((blend.compiled for blend in later), collections.Counter())
    stages = dict.fromkeys(("start", "fit", "catalog", "offset_errors"), 0)
    for (stage, _), number in compiled.items():
        stages[stage] += number
    begin = min(ROW_BLENDS, len(blends)) - 1
    return {
        "num_blends": len(blends),
        "num_converged": sum(blend.is_converged for blend in blends),
        "num_shapes": len(known),
        "compilations_first": blends[0].compiled.total(),
        "compilations_later": compiled.total(),
        "compilations_later_by_stage": stages,
        "compilations_of_known_shapes": repeated,
        "resident_mb_first": round(blends[0].resident_mb, 1),
        "resident_mb_begin": round(blends[begin].resident_mb, 1),
        "resident_mb_end": round(blends[-1].resident_mb, 1),
        "growth_mb": round(blends[-1].resident_mb - blends[begin].resident_mb, 1),
        "first_s": round(blends[0].seconds, 3),
        "later_median_s": round(float(np.median([blend.seconds for blend in later or blends])), 3),
    }


def print_summary(blends: list[Blend], result: dict):
    """Print what was compiled after the first blend, the memory and the times."""
    compiled = sum((blend.compiled for blend in blends[1:]), collections.Counter())
    for (stage, name), number in compiled.most_common():
        print(f"compiled after the first blend, in {stage}: {name}, {number} times")
    for number, shape in enumerate(dict.fromkeys(blend.shape for blend in blends), 1):
        start, end = (
            f"canvas {canvas}, (modes, window) {list(rendered)}, stamps {list(stamps)}"
            for canvas, rendered, stamps in shape
        )
        print(f"shape {number}: {start}" + ("" if start == end else f"; at the end {end}"))
    print(
        f"{result['num_converged']} of {result['num_blends']} fits converged; {result['num_shapes']} padded shape(s)\n"
        f"compilations after the first blend: {result['compilations_later']} (the first: "
        f"{result['compilations_first']}), of these {result['compilations_of_known_shapes']} in blends of a known "
        "shape\n"
        f"resident memory: {result['resident_mb_begin']:.0f} MB after blend {min(ROW_BLENDS, len(blends))}, "
        f"{result['resident_mb_end']:.0f} MB after blend {len(blends)}: growth {result['growth_mb']:.1f} MB\n"
        f"first blend {result['first_s']:.2f} s; median of the later ones {result['later_median_s']:.2f} s"
    )


def main():
    """Print a table, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blends", type=int, default=200)
    parser.add_argument("--sources", type=int, nargs=2, default=(5, 6), metavar=("FEWEST", "MOST"))
    parser.add_argument("--coverage", choices=("union", "intersection"), default="union", help="of the model frame")
    parser.add_argument("--turn", type=float, default=0.0, help="largest angle between the two images, degrees")
    parser.add_argument("--priors", action="store_true", help="put a prior on every center and flux")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    if options.blends < 1 or not 1 <= options.sources[0] <= options.sources[1]:
        parser.error("--blends wants a positive number, --sources two positive numbers in order")
    warnings.filterwarnings("ignore", message=".*leap-second.*")
    compilations, blends = Compilations(), []
    print(f"{'blends':>6}{'shapes':>8}{'compilations':>14}{'memory':>13}{'a blend':>11}")
    for seed in range(options.blends):
        blends.append(fit_blend(seed, options, compilations))
        if seed == 0 or (seed + 1) % ROW_BLENDS == 0 or seed + 1 == options.blends:
            print_row(blends)
    result = summarize(blends)
    print_summary(blends, result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
