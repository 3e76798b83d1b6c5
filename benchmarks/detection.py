"""Completeness and purity of joint detection on simulated blends seen by a space and a ground camera.

    python detection.py FOLDER_OR_FILES ... [--json] [--list]
    python detection.py --fields 20 --simulator make_blend.py [--first-seed 100] [--json]

Without files and simulator it says so and measures nothing.

Every file holds images of both cameras as `sf.read_observations` takes them, the sources that were drawn (TRUTH: ra, dec) and the
image of each alone without noise (SRC_HST). `--fields` has the script given draw so many into a temporary folder, every other one
with the space image turned by 23 degrees, with 4 to 9 sources: galaxies with and without bulge, with clumps, and stars.

The signal to noise of a source is that of its image in the space camera, `sqrt(sum of squares) / sigma * sum(k^2)^0.5` with k the
kernel [1, 2, 1] x [1, 2, 1] / 16 of the correlated noise: its power for smooth images is 1 / sum(k^2) of that of white noise.
Completeness counts sources above 20 whose neighbours are more than 0.3 arcsec away; purity counts all that was detected. A source
is found by the nearest detection within 0.15 arcsec, each of both once.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time
import warnings

import astropy.units as u
import numpy as np
from _blends import LEAST_SNR, add_blends, blends, is_wanted, pairs
from astropy.coordinates import SkyCoord
from astropy.io import fits

import scenefit as sf


def measure(path: pathlib.Path, options: dict) -> dict:
    """Detect in one field and compare with the truth."""
    observations = sf.read_observations(path)
    observations = [
        sf.CorrelatedObservation.from_observation(obs, progress=False) if obs.name == "HST" else obs
        for obs in observations
    ]
    frame = sf.Frame.from_observations(observations)
    start = time.perf_counter()
    found = sf.detect(observations, frame, progress=False, **options)
    seconds = time.perf_counter() - start
    with fits.open(path) as hdus:
        rows = hdus["TRUTH"].data
        # The epoch of the catalogue that comes with the images, FK5, is within a milliarcsecond of ICRS at this tolerance.
        truth = SkyCoord(rows["ra"], rows["dec"], unit=u.deg)
        kinds = [str(kind).strip() for kind in rows["kind"]]
        radii = np.array(rows["hlr_arcsec"], float)
        counts, snr = is_wanted(truth, hdus["SRC_HST"].data)
    number = pairs(truth, found.skycoord if len(found) else truth[:0])
    extra = sorted(set(range(len(found))) - set(number.tolist()))
    return {
        "field": path.stem,
        "seconds": seconds,
        "wanted": int(counts.sum()),
        "found": int((counts & (number >= 0)).sum()),
        "faint": int((~counts).sum()),
        "faint_found": int((~counts & (number >= 0)).sum()),
        "detections": len(found),
        "real": int((number >= 0).sum()),
        "clumps": len(found.clumps),
        "missed": [
            (kinds[n], round(float(snr[n]), 1), round(float(radii[n]), 2))
            for n in np.flatnonzero(counts & (number < 0))
        ],
        "false": [
            (
                round(float(found.table["y"][n].value)),
                round(float(found.table["x"][n].value)),
                round(float(found.table["significance"][n]), 1),
            )
            for n in extra
        ],
    }


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_blends(parser)
    parser.add_argument("--iterate", type=int, default=2, help="looks at what models leave")
    parser.add_argument("--threshold", type=float, default=5.0, help="significance")
    parser.add_argument("--list", action="store_true", help="name what was missed and what is false")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    options = {"iterate": arguments.iterate, "threshold": arguments.threshold}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fields = [measure(path, options) for path in blends(parser, arguments, pathlib.Path(folder))]
    if arguments.list:
        for field in fields:
            print(
                f"{field['field']}: missed {field['missed']}; false {field['false']} (y, x, S/N); {field['clumps']} clumps"
            )
    total = {
        key: sum(field[key] for field in fields)
        for key in ("wanted", "found", "faint", "faint_found", "detections", "real")
    }
    figures = {
        "fields": len(fields),
        "completeness": total["found"] / max(total["wanted"], 1),
        "purity": total["real"] / max(total["detections"], 1),
        **total,
        "seconds": float(np.median([field["seconds"] for field in fields])),
        "first_seconds": fields[0]["seconds"],
    }
    print(
        f"{len(fields)} fields: completeness {figures['completeness']:.3f} ({total['found']} of {total['wanted']} with S/N > "
        f"{LEAST_SNR:g}; {total['faint_found']} of {total['faint']} fainter), purity {figures['purity']:.3f} ({total['real']} of "
        f"{total['detections']}); {figures['seconds']:.2f} s a field, the first {figures['first_seconds']:.1f} s"
    )
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
