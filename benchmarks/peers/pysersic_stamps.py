"""pysersic: fits of the stamps that `stamps.py` wrote (argument), one by one; prints one JSON line.

Each stamp has a fitter and a prior of its own, from the stamp, and the maximum of the posterior is found as its
documentation has it. Every stamp compiles anew, which is counted apart.
"""

import json
import sys
import time

import jax
import numpy as np
from jax import monitoring
from pysersic import FitSingle
from pysersic.priors import autoprior

COMPILED = [0.0]


def note(event, seconds, **_):
    if event.startswith("/jax/core/compile"):
        COMPILED[0] += seconds


def main():
    monitoring.register_event_duration_secs_listener(note)
    content = np.load(sys.argv[1])
    psf, found = content["psf"].astype(np.float32), {"seconds": [], "compile_s": [], "flux": [], "n": []}
    for number, stamp in enumerate(content["stamps"].astype(np.float32)):
        begin, compiled = time.perf_counter(), COMPILED[0]
        prior = autoprior(stamp, "sersic", sky_type="none")
        fitter = FitSingle(data=stamp, rms=np.ones_like(stamp), psf=psf, prior=prior)
        best = fitter.find_MAP(rkey=jax.random.PRNGKey(number))
        for name in ("flux", "n"):
            found[name].append(float(best[name]))
        found["seconds"].append(time.perf_counter() - begin)
        found["compile_s"].append(COMPILED[0] - compiled)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
