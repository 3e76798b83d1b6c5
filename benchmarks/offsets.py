"""Error of the fitted offset of the second instrument against the first, on simulated fields with a known one.

    python offsets.py [FIELD.fits ...] [--fields 10] [--prior-width WIDTH] [--json]

Files have the layout of the packaged field: HDUs NAME_OBS, NAME_WEIGHTS, NAME_PSF, CATALOG, and OFF_E, OFF_N [arcsec]
in the primary header. Without files, fields are drawn by GalSim, one per seed: the sources and cameras of the packaged
field (make_demo_field.py), with other clumps and noise, the sources turned together around the middle, the first camera
turned by another angle, and another offset of the second one (normal, 30 mas in either direction). `--prior-width` replaces the
standard deviation of the prior of free pixels, in units of their envelope.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

import make_demo_field as demo
import numpy as np
from _blends import with_prior_width
from astropy.coordinates import SkyCoord
from astropy.io import fits

import scenefit as sf
from scenefit.model.parameters import ENVELOPE_SCATTER

OFFSET_SCATTER_ARCSEC = 0.03
MAX_ROTATION_DEG = 45.0


def observe(camera: demo.Camera, sources: list[demo.Source], rng: np.random.Generator) -> sf.Observation:
    """Return the noisy image that a camera takes of the sources."""
    clean, sigma = demo.render_field(camera, sources), np.reshape(camera.sigma, (-1, 1, 1))
    return sf.Observation(
        clean + sigma * rng.standard_normal(clean.shape),
        sigma=sigma,
        psf=sf.ImagePSF(demo.draw_psfs(camera)),
        wcs=camera.header(),
        channels=camera.channels,
        name=camera.name,
        zeropoint=camera.zeropoint,
    )


def simulate(seed: int) -> tuple[list[sf.Observation], SkyCoord, np.ndarray]:
    """Return observations, positions as a detection finds them, and the offset [arcsec] of the last observation."""
    rng = np.random.default_rng(seed)
    first, second = demo.make_cameras()
    offset = rng.normal(0, OFFSET_SCATTER_ARCSEC, 2)
    first = replace(first, rotation_deg=rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG))
    second = replace(second, offset_arcsec=tuple(offset))
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sources = []
    for source in demo.make_sources(rng):
        east, north = turn @ (source.east_arcsec, source.north_arcsec)
        sources.append(replace(source, east_arcsec=east, north_arcsec=north))
    errors = rng.normal(0, demo.CATALOG_NOISE_ARCSEC, (len(sources), 2))
    positions = [demo.displace(*source.coordinates_deg, *error) for source, error in zip(sources, errors, strict=True)]
    return [observe(camera, sources, rng) for camera in (first, second)], SkyCoord(positions, unit="deg"), offset


def read(path: str) -> tuple[list[sf.Observation], SkyCoord, np.ndarray]:
    """Return observations, positions and the offset of the last observation of a file."""
    header = fits.getheader(path)
    return sf.read_observations(path), sf.read_catalog(path)[0], np.array([header["OFF_E"], header["OFF_N"]])


def measure(
    field: str, observations: list[sf.Observation], positions: SkyCoord, offset: np.ndarray, width: float
) -> dict:
    """Fit a field with the offset of its last observation free; return its error and standard error in mas."""
    frame = sf.Frame.from_observations(observations)
    scene = sf.initialize(frame, observations, positions, model="pixel")
    name = observations[-1].name
    parameters = sf.Parameters.default(scene, observations).free(f"observations.{name}.astrometry.shift")
    result = sf.fit(scene, observations, with_prior_width(parameters, scene, width), progress=False)
    error = (result.observations[-1].astrometry.shift - offset) * 1e3
    return {
        "field": field,
        "status": result.status.name,
        "seconds": round(result.timing["fit"], 2),
        "error_mas": np.round(error, 3).tolist(),
        "standard_error_mas": np.round(sf.offset_errors(result)[name] * 1e3, 3).tolist(),
    }


def main():
    """Print a row a field and the distribution, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FIELD.fits")
    parser.add_argument("--fields", type=int, default=10, help="how many to simulate where no file is given")
    parser.add_argument("--prior-width", type=float, default=ENVELOPE_SCATTER)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*leap-second.*")
    rows = []
    for item in options.files or range(options.fields):
        field = simulate(item) if isinstance(item, int) else read(item)
        rows.append(measure(f"seed {item}" if isinstance(item, int) else Path(item).name, *field, options.prior_width))
        print(rows[-1], flush=True)
    error = np.abs([row["error_mas"] for row in rows])
    pull = error / np.array([row["standard_error_mas"] for row in rows])
    print(
        f"median error {np.median(error):.2f} mas, largest {error.max():.1f} mas; of {pull.size} components "
        f"{np.sum(pull > 3)} beyond 3 and {np.sum(pull > 5)} beyond 5 standard errors"
    )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
