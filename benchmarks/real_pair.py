"""Time to reach scarlet2's chi-square on a field of two instruments, and to converge.

    python real_pair.py FIELD.fits [--peer-python PYTHON | --peer-result FILE.npz] [--rtol 0.05 0.02 0.005] [--json]

scarlet2 runs in its own environment (`pip install scarlet2==0.5.1`; peers/scarlet2_blend.py) for 1000 iterations and saves
its model image. Both models are then judged by the same renderers: scenefit's, native pixels, each with its own fitted
offset. Times are those of the two fits, compilation included, from a cold process each; once with and once without the time that
`initialize` takes, as its start is a part of why the fit is short.

With `--rtol`, fits to several tolerances are compared: seconds, products and how far fluxes are from those of the narrowest one,
in units of their errors.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

import scenefit as sf

PEER = pathlib.Path(__file__).parent / "peers" / "scarlet2_blend.py"


def chi_squares(observations, model) -> dict[str, float]:
    """Return the chi-square of a scene or of a model image by observation."""
    return {obs.name: float(obs.chi_square(model).sum()) for obs in observations}


def judge_peer(observations, saved) -> dict[str, float]:
    """Return the chi-square of scarlet2's model image with its fitted offset of the second observation."""
    channels = [channel for obs in observations for channel in obs.channels]
    padding = 128
    wcs = WCS(fits.Header.fromstring(str(saved["header"])))
    frame = sf.Frame(saved["model"].shape[1:], channels=channels, wcs=wcs, padding=padding)
    unit = np.concatenate([obs.nanojansky for obs in observations])
    model = saved["model"] * unit[:, None, None]
    # scarlet2's shift is in model pixels (y, x) by which the image is displaced.
    shift = np.linalg.solve(frame.sky_jacobian(), saved["shift"])
    first, second = (obs.match(frame) for obs in observations)
    trials = [chi_squares([first, second.with_shift(sign * shift)], model) for sign in (1, -1, 0)]
    return min(trials, key=lambda trial: sum(trial.values()))


def compare_tolerances(scene, observations, parameters, tolerances) -> list[dict]:
    """Fit with several tolerances; print and return a row each."""
    rows, fluxes, errors = [], [], []
    for rtol in sorted(tolerances, reverse=True):
        result = sf.fit(scene, observations, parameters, rtol=rtol, progress=False, max_steps=300)
        table = sf.catalog(result, model_error=False)
        channels = scene.frame.channels
        fluxes.append(np.array([[row[f"flux_{c}"].value for c in channels] for row in table]))
        errors.append(np.array([[row[f"flux_err_{c}"].value for c in channels] for row in table]))
        rows.append(
            {
                "rtol": rtol,
                "status": result.status.name,
                "fit_s": result.timing["fit"],
                "products": int(result.history["products"][-1]),
                "loss": result.loss,
            }
        )
    for row, flux in zip(rows, fluxes, strict=True):
        row["off"] = float(np.max(np.abs(flux - fluxes[-1]) / errors[-1]))
        print(
            f"rtol {row['rtol']:<6} {row['status']}, {row['fit_s']:.1f} s, {row['products']} products, loss {row['loss']:.1f}, "
            f"largest difference {row['off']:.2f} errors"
        )
    return rows


def main():
    """Print the comparison, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field", nargs="?", default=str(sf.datasets.load("demo").path))
    parser.add_argument("--peer-python", help="Python of an environment with scarlet2")
    parser.add_argument("--peer-result", help="npz file that peers/scarlet2_blend.py wrote")
    parser.add_argument("--rtol", type=float, nargs="+", help="tolerances to compare")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    observations = sf.read_observations(options.field)
    catalog, _ = sf.read_catalog(options.field)
    start = time.perf_counter()
    frame = sf.Frame.from_observations(observations)
    scene = sf.initialize(frame, observations, catalog, model="pixel")
    initialized = time.perf_counter() - start
    parameters = sf.Parameters.default(scene, observations).free(
        f"observations.{observations[-1].name}.astrometry.shift"
    )
    result = sf.fit(scene, observations, parameters, progress=False)
    ours = chi_squares(result.observations, result.scene)
    row = {
        "initialize_s": initialized,
        "fit_s": result.timing["fit"],
        "status": result.status.name,
        "num_steps": result.num_steps,
        "chi_square": ours,
    }
    print(f"scenefit: {result.status.value}, {row['fit_s']:.2f} s, chi-square {sum(ours.values()):.0f}  {ours}")
    products, seconds = result.history["products"], result.history["seconds"]
    each = (seconds[-1] - seconds[0]) / max(products[-1] - products[0], 1)
    print(
        f"first step {seconds[0]:.2f} s with {products[0]} products; {products[-1]} in all, later ones {1e3 * each:.1f} ms each"
    )
    if options.peer_python or options.peer_result:
        with tempfile.TemporaryDirectory() as folder:
            saved = options.peer_result or f"{folder}/peer.npz"
            if options.peer_python:
                command = [options.peer_python, str(PEER), options.field, saved]
                subprocess.run(command, check=True, capture_output=True)
            peer = dict(np.load(saved))
        theirs = judge_peer(observations, peer)
        # The loss includes the prior: an upper bound of half the chi-square.
        reached = np.nonzero(2 * result.history["loss"] <= sum(theirs.values()))[0]
        seconds = float(result.history["seconds"][reached[0]]) if len(reached) else float("nan")
        row["peer"] = {"fit_s": float(peer["seconds"]), "chi_square": theirs}
        ratios = np.array([seconds, seconds + initialized]) / float(peer["seconds"])
        row["reached_s"], row["ratio"], row["ratio_with_start"] = seconds, *ratios.tolist()
        print(f"scarlet2: {row['peer']['fit_s']:.2f} s, chi-square {sum(theirs.values()):.0f}  {theirs}")
        print(
            f"scenefit reaches scarlet2's chi-square after {seconds:.2f} s: {ratios[0]:.3f} of its fit's time; with "
            f"{initialized:.2f} s of initialize {ratios[1]:.3f}"
        )
    if options.rtol:
        row["tolerances"] = compare_tolerances(scene, observations, parameters, options.rtol)
    if options.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
