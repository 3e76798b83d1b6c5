from importlib.metadata import version as installed_version

project = "scenefit"
author = "the scenefit developers"
copyright = "2026, the scenefit developers"
release = installed_version("scenefit")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"scenefit {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Shapes and units stand in the docstrings; the signature shows the annotation as written.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
# A field described under Attributes is listed once, not again as a member.
napoleon_use_ivar = True
