"""Photometry of simulated blends, from files to a catalogue, against the truth and against the photometric limit.

    python blend_photometry.py FOLDER_OR_FILES ... [--detect] [--model auto|pixel] [--prior-width WIDTH] [--list] [--json]
    python blend_photometry.py --fields 20 --simulator make_blend.py [--first-seed 100] [--json]

Without files and simulator it says so and measures nothing.

Every file holds images of a space and a ground camera as `sf.read_observations` takes them, the positions of the sources
(CATALOG), their magnitudes (TRUTH), the offset of the ground camera (OFF_E, OFF_N) and the image of each source alone without
noise (SRC_HST, SRC_HSC). All is done as `scenefit fit`
does it: noise measured where it is correlated, families chosen, offset of the ground camera fitted. With `--detect` the positions
are not given; completeness and purity of the catalogue are then those of `detection.py`, after the fit has moved its sources.
`--model` takes free pixels for all sources, and `--prior-width` replaces the standard deviation of the prior of free pixels, in
units of their envelope.

The limit is a linear fit of fluxes with the true images of all sources: the error that is left if every shape is known. The
isolated half of all sources is that with the least light of others within their own (weighted with it, in i from the ground).
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
from _blends import LEAST_SNR, add_blends, blends, is_wanted, pairs, with_prior_width
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table

import scenefit as sf
from scenefit.model.parameters import ENVELOPE_SCATTER

CHANNELS = ("F814W", "g", "r", "i", "z", "y")
OUTLIER = 0.5


def spread(values) -> float:
    """Return the standard deviation from the median absolute deviation."""
    values = np.asarray(values)[np.isfinite(values)]
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def limit(hdus, truth) -> tuple[np.ndarray, np.ndarray]:
    """Return magnitude errors of fluxes fitted with the true images, and the light of others over each source's own."""
    errors = np.full((len(truth), len(CHANNELS)), np.nan)
    for number, channel in enumerate(CHANNELS):
        name, plane = ("HST", np.s_[:]) if number == 0 else ("HSC", np.s_[:, number - 1])
        images = hdus[f"SRC_{name}"].data[plane].astype(float)
        data, weights = (hdus[f"{name}_{part}"].data.astype(float) for part in ("OBS", "WEIGHTS"))
        data, weights = (each if number == 0 else each[number - 1] for each in (data, weights))
        use = weights > 0
        design = images[:, use].T / truth[f"flux_{channel}"]
        matrix = design.T @ (design * weights[use][:, None])
        flux = np.linalg.solve(matrix, design.T @ (weights[use] * data[use]))
        errors[:, number] = -2.5 * np.log10(np.maximum(flux / truth[f"flux_{channel}"], 1e-9))
    own = hdus["SRC_HSC"].data[:, CHANNELS.index("i") - 1].astype(float)
    others = own.sum(axis=0) - own
    return errors, (own * others).sum(axis=(1, 2)) / (own**2).sum(axis=(1, 2))


def measure(path: pathlib.Path, detect: bool, model: str = "auto", width: float = ENVELOPE_SCATTER) -> dict:
    """Fit one field and compare with the truth; NaN for sources that weren't found."""
    with fits.open(path) as hdus:
        truth = Table(hdus["TRUTH"].data)
        limits, overlap = limit(hdus, truth)
        sky = SkyCoord(truth["ra"], truth["dec"], unit=u.deg)
        wanted, _ = is_wanted(sky, hdus["SRC_HST"].data)
        header = hdus[0].header
        offset = np.array([header["OFF_E"], header["OFF_N"]])
    start = time.perf_counter()
    observations = [sf.CorrelatedObservation.if_correlated(o, progress=False) for o in sf.read_observations(path)]
    frame = sf.Frame.from_observations(observations)
    positions = None if detect else sf.read_catalog(Table.read(path, hdu="CATALOG"))[0]
    scene = sf.initialize(frame, observations, positions, model=model, progress=False)
    parameters = sf.Parameters.default(scene, observations).free("observations.HSC.astrometry.shift")
    if width != ENVELOPE_SCATTER:
        parameters = with_prior_width(parameters, scene, width)
    result = sf.fit(scene, observations, parameters, progress=False)
    table = sf.catalog(result, progress=False)
    seconds = time.perf_counter() - start
    number = pairs(sky, SkyCoord(table["ra"], table["dec"])) if detect else np.arange(len(truth))
    found = number >= 0
    error, sigma = (np.full((len(truth), len(CHANNELS)), np.nan) for _ in range(2))
    for place, channel in enumerate(CHANNELS):
        magnitude, width = (np.asarray(table[f"{name}_{channel}"].value, float) for name in ("mag", "mag_err"))
        error[found, place] = (magnitude[number] - truth[f"mag_{channel}"])[found]
        sigma[found, place] = width[number][found]
    return {
        "field": path.stem,
        "seconds": seconds,
        "steps": result.num_steps,
        "status": result.status.name,
        "offset_mas": 1e3 * (result.observations[-1].astrometry.shift - offset),
        "kinds": [str(kind).strip() for kind in truth["kind"]],
        "magnitudes": np.asarray(truth["mag_i"], float),
        "error": error,
        "sigma": sigma,
        "limit": limits,
        "overlap": overlap,
        "wanted": wanted,
        "false": len(table) - int(found.sum()),
    }


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_blends(parser)
    parser.add_argument("--detect", action="store_true", help="find the sources, instead of taking their positions")
    parser.add_argument("--model", choices=("auto", "pixel"), default="auto", help="what sources are made of")
    parser.add_argument(
        "--prior-width", type=float, default=ENVELOPE_SCATTER, help="of free pixels, with --model pixel"
    )
    parser.add_argument("--list", action="store_true", help="print the errors of every source")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    if arguments.prior_width != ENVELOPE_SCATTER and arguments.model != "pixel":
        parser.error("--prior-width wants --model pixel")
    fields = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for path in blends(parser, arguments, pathlib.Path(folder)):
            field = measure(path, arguments.detect, arguments.model, arguments.prior_width)
            fields.append(field)
            print(
                f"{field['field']}: {len(field['kinds'])} sources, {field['steps']} steps, {field['seconds']:.1f} s",
                flush=True,
            )
            if arguments.list:
                for kind, magnitude, row in zip(field["kinds"], field["magnitudes"], field["error"], strict=True):
                    print(f"  {kind:7s} {magnitude:5.2f} " + " ".join(f"{value:+.3f}" for value in row))
    error, sigma, limits = (np.concatenate([field[key] for field in fields]) for key in ("error", "sigma", "limit"))
    overlap, wanted = (np.concatenate([field[key] for field in fields]) for key in ("overlap", "wanted"))
    found = np.isfinite(error).any(axis=1)
    isolated = overlap <= np.median(overlap)
    figures = {
        "fields": len(fields),
        "sources": len(error),
        "found": int(found.sum()),
        "false": sum(field["false"] for field in fields),
        "completeness": float(found[wanted].sum() / max(wanted.sum(), 1)),
        "purity": float(found.sum() / max(found.sum() + sum(field["false"] for field in fields), 1)),
        "seconds": float(np.median([field["seconds"] for field in fields])),
        "first_seconds": fields[0]["seconds"],
        "not_converged": sum(field["status"] != "CONVERGED" for field in fields),
        "offset_error_mas": float(np.median(np.abs([field["offset_mas"] for field in fields]))),
    }
    print(
        "channel  median|error|  limit  MAD sigma  limit  beyond 0.5 mag  pulls  isolated: median|error|, of the limit"
    )
    for number, channel in enumerate(CHANNELS):
        own, known = error[:, number], limits[:, number]
        values = {
            "median": float(np.nanmedian(np.abs(own))),
            "limit": float(np.nanmedian(np.abs(known))),
            "mad_sigma": spread(own),
            "limit_mad_sigma": spread(known),
            "outliers": float(np.mean(np.abs(own[np.isfinite(own)]) > OUTLIER)),
            "pull_width": spread(own / sigma[:, number]),
            "isolated": float(np.nanmedian(np.abs(own[isolated]))),
        }
        values["isolated_ratio"] = values["isolated"] / float(np.nanmedian(np.abs(known[isolated])))
        figures[channel] = values
        print(f"{channel:7s}  " + "  ".join(f"{value:.4f}" for value in values.values()))
    g, i = (CHANNELS.index(name) for name in "gi")
    figures["g_i"] = {"mad_sigma": spread(error[:, g] - error[:, i]), "limit": spread(limits[:, g] - limits[:, i])}
    print(
        f"g - i: MAD sigma {figures['g_i']['mad_sigma']:.4f} (limit {figures['g_i']['limit']:.4f}); {figures['found']} of "
        f"{figures['sources']} sources, {figures['false']} false; {figures['seconds']:.1f} s a field, the first "
        f"{figures['first_seconds']:.1f} s; {figures['not_converged']} not converged; median error of a component "
        f"of the offset of the ground camera {figures['offset_error_mas']:.2f} mas"
    )
    if arguments.detect:
        print(
            f"completeness {figures['completeness']:.3f} ({found[wanted].sum()} of {wanted.sum()} with S/N > {LEAST_SNR:g}), "
            f"purity {figures['purity']:.3f}"
        )
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
