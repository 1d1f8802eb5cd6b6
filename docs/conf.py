"""Sphinx with MyST; warnings are errors in `make docs`."""

from diffguide import __version__

project = "diffguide"
author = "the diffguide authors"
copyright = author
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"diffguide {version}"
