"""Error of the fitted offset of the second instrument against the first, on simulated fields with a known one.

    python offsets.py [FIELD.fits ...] [--json]

Fields have the layout of the packaged one: HDUs NAME_OBS, NAME_WEIGHTS, NAME_PSF, CATALOG, and OFF_E, OFF_N [arcsec] in the
primary header. Without arguments, the packaged field.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from astropy.io import fits

import scenefit as sf
from scenefit.survey.catalog import offset_errors


def measure(path: str) -> dict:
    """Fit a field with the offset of its last observation free; return its error and standard error in mas."""
    observations = sf.read_observations(path)
    positions, _ = sf.read_catalog(path)
    header = fits.getheader(path)
    frame = sf.Frame.from_observations(observations)
    scene = sf.initialize(frame, observations, positions)
    name = observations[-1].name
    parameters = sf.Parameters.default(scene, observations).free(f"observations.{name}.astrometry.shift")
    result = sf.fit(scene, observations, parameters, progress=False)
    error = (result.observations[-1].astrometry.shift - np.array([header["OFF_E"], header["OFF_N"]])) * 1e3
    return {
        "field": path.rsplit("/", 1)[-1],
        "status": result.status.name,
        "seconds": round(result.timing["fit"], 2),
        "error_mas": np.round(error, 3).tolist(),
        "standard_error_mas": np.round(offset_errors(result)[name] * 1e3, 3).tolist(),
    }


def main():
    """Print a row a field and the distribution, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*", default=[str(sf.datasets.load("demo").path)])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for path in options.fields:
        rows.append(measure(path))
        print(rows[-1], flush=True)
    error = np.abs([row["error_mas"] for row in rows])
    pull = error / np.array([row["standard_error_mas"] for row in rows])
    print(
        f"median error {np.median(error):.2f} mas; of {pull.size} components {np.sum(pull > 3)} beyond 3 and "
        f"{np.sum(pull > 5)} beyond 5 standard errors"
    )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
