"""Time to reach scarlet2's chi-square on a field of two instruments, and to converge.

    python real_pair.py FIELD.fits [--peer-python PYTHON | --peer-result FILE.npz] [--json]

scarlet2 runs in its own environment (`pip install scarlet2==0.5.1`; peers/scarlet2_blend.py) for 1000 iterations and saves
its model image. Both models are then judged by the same renderers: scenefit's, native pixels, each with its own fitted
offset. Times are those of the two fits, compilation included, from a cold process each.
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


def main():
    """Print the comparison, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field", nargs="?", default=str(sf.datasets.load("demo").path))
    parser.add_argument("--peer-python", help="Python of an environment with scarlet2")
    parser.add_argument("--peer-result", help="npz file that peers/scarlet2_blend.py wrote")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    observations = sf.read_observations(options.field)
    catalog, _ = sf.read_catalog(options.field)
    start = time.perf_counter()
    frame = sf.Frame.from_observations(observations)
    scene = sf.initialize(frame, observations, catalog)
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
        row["reached_s"], row["ratio"] = seconds, seconds / float(peer["seconds"])
        print(f"scarlet2: {row['peer']['fit_s']:.2f} s, chi-square {sum(theirs.values()):.0f}  {theirs}")
        print(f"scenefit reaches scarlet2's chi-square after {seconds:.2f} s: {row['ratio']:.3f} of its fit's time")
    if options.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
