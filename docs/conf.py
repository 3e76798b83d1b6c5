import re
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx import addnodes
from sphinx.errors import ConfigError

import scenefit

project = "scenefit"
author = "the scenefit developers"
copyright = "2026, the scenefit developers"
release = installed_version("scenefit")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"scenefit {release}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Shapes and units stand in the docstrings; the signature shows the annotation as written.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
# A field described under Attributes is listed once, not again as a member.
napoleon_use_ivar = True


def check_reference():
    """Raise ConfigError unless api.md has every public name."""
    listed = set(re.findall(r"^\.\. auto\w+:: scenefit\.(\w+)", (Path(__file__).parent / "api.md").read_text(), re.M))
    if missing := sorted(set(scenefit.__all__) - listed):
        raise ConfigError(f"api.md lacks public names of scenefit: {', '.join(missing)}")


def unlink_shapes(app, doctree):
    """Turn the word "shape" of docstring types, as in "array, shape (channel, y, x)", from a reference into text."""
    for reference in list(doctree.findall(addnodes.pending_xref)):
        if reference.get("refdomain") == "py" and reference["reftarget"] == "shape":
            reference.replace_self(reference.children)


def setup(app):
    check_reference()
    app.connect("doctree-read", unlink_shapes)
