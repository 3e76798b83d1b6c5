"""One page about a fit that needs nothing but itself: what `scenefit report` writes."""

from __future__ import annotations

import base64
import html
import io as memory
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
from astropy.table import QTable

from scenefit.app import io, plot
from scenefit.app.results import Results, read_results
from scenefit.arrays.progress import with_progress
from scenefit.infer.fit import FitResult
from scenefit.sky.frame import pixel_scale_of
from scenefit.survey.catalog import channel_label
from scenefit.survey.flags import Flag

NAME = "report.html"
"""Name of the page."""
MAX_STAMPS = 50
"""Sources that are shown one by one unless told otherwise: a page with all of a large field would be too large to open."""
TEMPLATE = Path(__file__).parent / "data" / NAME
DPI = 96
MISSING = "–"
"""Stands where there is no value."""
_SUMMARY_ROWS = {
    "status_text": "status",
    "num_sources": "sources",
    "num_steps": "steps",
    "loss": "loss",
    "peak_memory_mb": "peak memory [MB]",
}
_DECIMALS = {"ra": 7, "dec": 7, "y": 3, "x": 3, "snr": 1}
"""Decimals of columns whose errors don't say how many make sense, or aren't there."""


def write_report(directory: Path, *, num_stamps: int = MAX_STAMPS, progress: bool = True) -> Path:
    """Write a page about the fit in a folder: catalogue, images, single sources, convergence, flags, versions, timing.

    The page holds its figures and its few lines of script and asks for nothing else: it works offline, and wherever it is sent.

    Parameters
    ----------
    directory : Path
        Folder that `scenefit fit` wrote into.
    num_stamps : int
        Number of sources shown one by one, the first of the catalogue.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    Path
        Of the page, `report.html` in that folder, written whole or not at all.

    Raises
    ------
    OSError, ValueError
        If results are missing or can't be read, or the number is negative.
    """
    if num_stamps < 0:
        raise ValueError(f"The number of stamps is at least 0; got {num_stamps}.")
    results = read_results(directory)
    page = compose(results, title=f"scenefit: {directory.resolve().name}", num_stamps=num_stamps, progress=progress)
    io.write_text(directory / NAME, page)
    return directory / NAME


def compose(results: Results, *, title: str, num_stamps: int = MAX_STAMPS, progress: bool = True) -> str:
    """Return the page about a fit as HTML; see `write_report`."""
    fit, table, summary = results
    names = list(fit.scene.sources)[:num_stamps]
    places = {name: f"source-{number}" for number, name in enumerate(names)}
    cells = catalog_cells(table)
    stamps = [
        _stamp(fit, name, _heading(cells, name), places[name], is_open=name == names[0])
        for name in with_progress(names, "stamps", progress)
    ]
    left_out = len(fit.scene.sources) - len(names)
    columns = [f"{obs.name} rendered, {obs.name} data minus others" for obs in fit.observations]
    tables = {
        "Outcome": {label: summary.get(key) for key, label in _SUMMARY_ROWS.items()},
        "Seconds": summary.get("seconds") or {},
        "Versions": summary.get("versions") or {},
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escape(title),
        headline=_escape(
            f"{len(table)} sources in {len(fit.observations)} observations with {len(fit.scene.frame.channels)} channels; fit "
            f"{fit.status.value} after {fit.num_steps} steps."
        ),
        catalog_note=_escape(
            "Values ± standard errors; – where there is none. Click on a heading to sort; a source's name leads to its images."
        ),
        catalog=catalog_table(table, cells, places),
        scene=_image(plot.scene(fit.scene, fit.observations), "model, and observed, rendered and residual images"),
        sources_note=_escape(
            f"From left to right: model, {', '.join(columns)}. Open one to see it."
            + (f" {left_out} further sources aren't shown." if left_out else "")
        ),
        sources="\n".join(stamps),
        observations=_observations_table(fit, summary.get("observations") or {}),
        tables="\n".join(f"<div><h3>{_escape(name)}</h3>{_pairs(rows)}</div>" for name, rows in tables.items()),
        convergence=_convergence(fit),
        flags=_flags_table(table),
    )


def catalog_table(table: QTable, cells: Mapping[str, Sequence[tuple[str, str]]], places: Mapping[str, str]) -> str:
    """Return a catalogue as a table that can be sorted.

    Parameters
    ----------
    table : QTable
        From `catalog`.
    cells : mapping
        What `catalog_cells` makes of it.
    places : mapping of str
        Anchors on the page by the `id` of a source.
    """
    heads = []
    for name in cells:
        unit = str(table[name].unit or "")
        shown = f' <span class="unit">[{_escape(unit)}]</span>' if unit else ""
        heads.append(f'<th scope="col"><button type="button">{_escape(name)}{shown}</button></th>')
    rows = []
    for row in zip(*cells.values(), strict=True):
        line = []
        for name, (value, text) in zip(cells, row, strict=True):
            marked = ' class="flagged"' if name == "flags" and text != MISSING else ""
            shown = _escape(text)
            if name == "id" and text in places:
                shown = f'<a href="#{places[text]}">{shown}</a>'
            line.append(f'<td data-value="{_escape(value)}"{marked}>{shown}</td>')
        rows.append(f"<tr>{''.join(line)}</tr>")
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f'<table class="sortable" id="sources-table">{head}<tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


def catalog_cells(table: QTable) -> dict[str, list[tuple[str, str]]]:
    """Return by what each cell of a catalogue is sorted and its text, by column; errors stand beside what they belong to."""
    errors = _merged_errors(table)
    cells = {}
    for name in table.colnames:
        if name in errors.values():
            continue
        values = _plain(table[name])
        if name == "flags":
            cells[name] = [_flag_cell(int(value)) for value in values]
        elif values.dtype.kind == "f" and values.ndim == 1:
            sigmas = _plain(table[errors[name]]) if name in errors else np.full(len(values), np.nan)
            cells[name] = [_number_cell(*pair, _DECIMALS.get(name)) for pair in zip(values, sigmas, strict=True)]
        else:
            cells[name] = [(str(value), str(value)) for value in values]
    return cells


def _merged_errors(table: QTable) -> dict[str, str]:
    """Return the columns of errors by those that they are of, where both are in one unit."""
    merged = {}
    for name in table.colnames:
        kind, _, channel = name.partition("_")
        error = f"{kind}_err_{channel}" if kind in ("flux", "mag") else f"{name}_err"
        if error in table.colnames and table[error].unit == table[name].unit:
            merged[name] = error
    return merged


def _plain(column) -> np.ndarray:
    """Return the values of a column; NaN where a number is masked."""
    values = np.ma.asanyarray(getattr(column, "value", column))
    return values.filled(np.nan) if values.dtype.kind == "f" else np.asarray(values)


def _flag_cell(value: int) -> tuple[str, str]:
    """Return flags and their names."""
    return str(value), ", ".join(flag.name or "" for flag in Flag if value & flag) or MISSING


def _number_cell(value: float, sigma: float, decimals: int | None) -> tuple[str, str]:
    """Return a number by which to sort, empty if it is none, and with its error as text."""
    if not np.isfinite(value):
        return "", MISSING
    if np.isfinite(sigma) and sigma > 0:
        # Two digits of the error.
        decimals = int(np.clip(1 - np.floor(np.log10(sigma)), 0, 6))
        text = f"{value:.{decimals}f} ± {sigma:.{decimals}f}"
    else:
        text = f"{value:.5g}" if decimals is None else f"{value:.{decimals}f}"
        text += " ± ∞" if np.isinf(sigma) else ""
    # The minus sign of typesetting, so that columns line up.
    return repr(float(value)), text.replace("-", "−")


def _heading(cells: Mapping[str, Sequence[tuple[str, str]]], name: str) -> str:
    """Return a source's name, magnitudes and flags; the name alone if the catalogue doesn't have it."""
    rows = [number for number, (_, text) in enumerate(cells["id"]) if text == name]
    heading = f"<b>{_escape(name)}</b>"
    for row in rows[:1]:
        magnitudes = {
            key.removeprefix("mag_"): column[row][1] for key, column in cells.items() if key.startswith("mag_")
        }
        heading += " " + _escape(", ".join(f"{channel} {text}" for channel, text in magnitudes.items()))
        if "flags" in cells and cells["flags"][row][1] != MISSING:
            heading += f' <span class="flagged">{_escape(cells["flags"][row][1])}</span>'
    return heading


def _stamp(fit: FitResult, name: str, heading: str, place: str, is_open: bool) -> str:
    """Return the images of a source, under a heading that opens them."""
    try:
        content = _image(plot.sources(fit.scene, fit.observations, [name]), f"images of source {name}")
    # A source that left the frame has no picture, but its row.
    except ValueError as exc:
        content = f"<p>{_escape(exc)}</p>"
    opened = " open" if is_open else ""
    return f'<details id="{place}"{opened}><summary>{heading}</summary>{content}</details>'


def _image(figure, text: str) -> str:
    """Return a figure as an image inside the page."""
    buffer = memory.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img loading="lazy" alt="{_escape(text)}" src="data:image/png;base64,{data}">'


def _convergence(fit: FitResult) -> str:
    """Return the figure of the fit's convergence; nothing where none was recorded."""
    if not np.size(fit.history.get("loss", ())):
        return ""
    return _image(plot.convergence(fit), "loss above its best value, and projected gradient, by step")


def _observations_table(fit: FitResult, summaries: Mapping) -> str:
    """Return what the observations are and how well they are fitted."""
    rows = []
    for obs in fit.observations:
        values = summaries.get(obs.name) or {}
        per_pixel = values.get("chi_square_per_pixel") or {}
        texts = [f"{channel} {_number(value)}" for channel, value in per_pixel.items()]
        pairs = zip(values.get("offset_arcsec") or (), values.get("offset_error_arcsec") or (), strict=True)
        offset = ", ".join(_number(value) + ("" if error is None else f" ± {error:.2g}") for value, error in pairs)
        scale = MISSING if obs.wcs is None else f'{pixel_scale_of(obs.wcs):.4g}"'
        channels = ", ".join(channel_label(channel) for channel in obs.channels)
        shape = " × ".join(map(str, obs.shape[1:]))
        rows.append(
            (
                obs.name,
                channels,
                shape,
                scale,
                values.get("noise", MISSING),
                ", ".join(texts) or MISSING,
                offset or MISSING,
            )
        )
    heads = (
        "observation",
        "channels",
        "pixels",
        "pixel scale",
        "noise",
        "χ² per pixel",
        "offset (east, north) [arcsec]",
    )
    return _table(heads, rows, text_columns=(0, 1, 4, 5, 6))


def _flags_table(table: QTable) -> str:
    """Return what the flags mean and how many sources have each."""
    flags = np.asarray(table["flags"], dtype=int) if "flags" in table.colnames else np.zeros(0, int)
    rows = [(flag.name, int(flag), int(np.sum((flags & flag) != 0)), flag.__doc__) for flag in Flag]
    return _table(("flag", "bit", "sources", "meaning"), rows, text_columns=(0, 3))


def _pairs(rows: Mapping) -> str:
    """Return names and values as a table."""
    return _table((), [(name, _number(value)) for name, value in rows.items()], text_columns=(0,))


def _table(heads: Sequence, rows: Sequence[Sequence], text_columns: Sequence[int]) -> str:
    """Return a table of text, all of it escaped; columns of text are flush left."""

    def line(values, tag):
        kinds = [' class="text"' if number in text_columns else "" for number in range(len(values))]
        return "".join(f"<{tag}{kind}>{_escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    head = f"<thead><tr>{line(heads, 'th')}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _number(value) -> str:
    """Return a value of a summary as text."""
    if value is None:
        return MISSING
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def _escape(value) -> str:
    """Return text as HTML shows it."""
    return html.escape(str(value), quote=True)
