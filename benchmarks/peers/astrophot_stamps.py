"""AstroPhot: Levenberg-Marquardt fits of the stamps that `stamps.py` wrote (argument), one by one; prints one JSON line."""

import json
import sys
import time

import astrophot as ap
import numpy as np

ap.config.set_logging_output(stdout=False)


def main():
    content = np.load(sys.argv[1])
    seconds = []
    for n, stamp in enumerate(content["stamps"]):
        begin = time.perf_counter()
        target = ap.TargetImage(
            data=stamp, psf=content["psf"], variance=np.ones(stamp.shape), pixelscale=1.0, zeropoint=27.0, name=f"t{n}"
        )
        model = ap.Model(name=f"m{n}", model_type="sersic galaxy model", target=target, psf_convolve=True)
        model.initialize()
        ap.fit.LM(model, verbose=0).fit()
        seconds.append(time.perf_counter() - begin)
    # The first one loads and warms up.
    print(json.dumps({"seconds": float(np.median(seconds[1:])), "first_s": seconds[0]}))


if __name__ == "__main__":
    main()
