"""pysersic: the linked three-band fit of `linked_bands.py`, from the arrays that it wrote; prints one JSON line.

python pysersic_linked.py ARRAYS.npz METHOD      (laplace, svi-flow)
"""

import json
import sys
import time

import jax
import numpy as np
from jax import monitoring
from pysersic import FitSingle
from pysersic.loss import student_t_loss
from pysersic.multiband import FitMultiBandPoly
from pysersic.priors import autoprior
from pysersic.rendering import HybridRenderer

COMPILED = [0.0]


def note(event, seconds, **_):
    if event.startswith("/jax/core/compile"):
        COMPILED[0] += seconds


def main():
    monitoring.register_event_duration_secs_listener(note)
    content, method = np.load(sys.argv[1]), sys.argv[2]
    bands, mask = [str(band) for band in content["bands"]], content["mask"].astype(int)
    fitters = []
    for data, sigma, psf in zip(content["data"], content["sigma"], content["psf"], strict=True):
        data, sigma, psf = (a.astype(np.float32) for a in (data, sigma, psf))
        prior = autoprior(data, "sersic", mask, sky_type="flat")
        fitters.append(
            FitSingle(data=data, rms=sigma, psf=psf, prior=prior, mask=mask.copy(), loss_func=student_t_loss)
        )
    begin, compiled = time.perf_counter(), COMPILED[0]
    joint = FitMultiBandPoly(
        fitter_list=fitters,
        wavelengths=[float(w) for w in content["wavelengths"]],
        band_names=bands,
        linked_params=["n", "ellip", "r_eff"],
        const_params=["xc", "yc", "theta"],
        wv_to_save=np.linspace(0.472, 0.926, num=10),
        poly_order=2,
    )
    posterior = joint.estimate_posterior(method=method, rkey=jax.random.PRNGKey(19)).idata.posterior
    seconds, compiled = time.perf_counter() - begin, COMPILED[0] - compiled
    table = {}
    for name in posterior.data_vars:
        draws = np.asarray(posterior[name])
        if draws.ndim == 2:
            table[name] = [float(draws.mean()), float(draws.std())]
    # What its renderer makes of a profile of unit flux and index 0.7.
    psf = content["psf"][0].astype(np.float32)
    parameters = {"xc": 60.0, "yc": 60.0, "flux": 1.0, "r_eff": 7.0, "n": 0.7, "ellip": 0.3, "theta": 0.3}
    image = HybridRenderer((121, 121), jax.numpy.array(psf)).render_source(parameters, "sersic")
    found = {"seconds": seconds, "compile_s": compiled, "rendered_flux": float(np.sum(image)), "table": table}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
