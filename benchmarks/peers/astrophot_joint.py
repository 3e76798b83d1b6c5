"""AstroPhot: joint Levenberg-Marquardt fits of the images that `joint_images.py` wrote; prints one JSON line.

python astrophot_joint.py FOLDER      (with images.npz, and NAME_SEED.fits for every image and noise draw)
"""

import json
import sys
import time
from pathlib import Path

import astrophot as ap
import numpy as np

ap.config.set_logging_output(stdout=False)
SHARED = ("center", "q", "PA", "n", "Re")


def make_model(folder, content, seed):
    """Return the group of one Sersic model for each image, of which all but the brightness is one parameter."""
    members = []
    for name in map(str, content["names"]):
        sigma = float(content[f"sigma_{name}"])
        path = folder / f"{name}_{seed}.fits"
        # It wants the variance as an image, and reads the WCS from the file, with a CD matrix.
        target = ap.TargetImage(
            filename=str(path),
            variance=np.full(content[f"shape_{name}"], sigma**2),
            psf=content[f"psf_{name}"],
            zeropoint=25.0,
            name=f"{name}_{seed}",
        )
        member = ap.Model(
            name=f"galaxy_{name}_{seed}", model_type="sersic galaxy model", target=target, psf_convolve=True
        )
        for parameter in SHARED if members else ():
            member[parameter].value = members[0][parameter]
        members.append(member)
    targets = ap.TargetImageList(tuple(member.target for member in members))
    return ap.Model(name=f"joint_{seed}", model_type="group model", models=members, target=targets), members


def main():
    folder = Path(sys.argv[1])
    content = np.load(folder / "images.npz")
    found = {"initialize_s": [], "fit_s": [], "steps": [], "chi_square": [], "message": [], "n": [], "radius": []}
    for seed in range(int(content["draws"])):
        model, members = make_model(folder, content, seed)
        begin = time.perf_counter()
        model.initialize()
        ready = time.perf_counter()
        fitter = ap.fit.LM(model, verbose=0)
        fitter.fit()
        end = time.perf_counter()
        found["initialize_s"].append(ready - begin)
        found["fit_s"].append(end - ready)
        found["steps"].append(len(fitter.loss_history) - 1)
        found["chi_square"].append(float(np.nanmin([float(np.ravel(loss)[0]) for loss in fitter.loss_history])))
        found["message"].append(str(fitter.message))
        for name, parameter in (("n", "n"), ("radius", "Re")):
            found[name].append(float(np.ravel(members[0][parameter].npvalue)[0]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
