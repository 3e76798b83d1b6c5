"""imcascade: least squares and 'express' sampling of the image from `multi_gaussian.py` (argument); prints one JSON line."""

import json
import sys
import time

import numpy as np
from imcascade.fitter import initialize_fitter
from imcascade.results import ImcascadeResults


def main():
    content = np.load(sys.argv[1])
    data, psf = content["data"].astype(float), content["psf"].astype(float)
    begin = time.perf_counter()
    fitter = initialize_fitter(data, psf, err=np.full(data.shape, float(content["sigma"])))
    prepared = time.perf_counter()
    fitter.run_ls_min()
    solved = time.perf_counter()
    best = {name: float(np.ravel(value)[0]) for name, value in ImcascadeResults(fitter).run_basic_analysis().items()}
    again = time.perf_counter()
    fitter.run_dynesty(method="express", run_nested_kwargs={"print_progress": False})
    sampled = time.perf_counter()
    # Median and distances to the ends of the central 68 %.
    table = ImcascadeResults(fitter).run_basic_analysis()
    quantiles = {}
    for name, value in table.items():
        middle, first, second = (float(v) for v in np.ravel(value)[:3])
        quantiles[name] = [middle - abs(first), middle, middle + abs(second)]
    record = {
        "prepare_s": prepared - begin,
        "least_squares_s": solved - prepared,
        "posterior_s": sampled - again,
        "least_squares": best,
        "quantiles": quantiles,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
