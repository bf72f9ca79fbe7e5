"""The documentation as a site, with Sphinx and MyST: `make docs` says where it is.

The root is the repository's, so that README.md belongs to the site and links are the same here and in a code browser.
"""

from __future__ import annotations

project = "finemoe"
author = "the finemoe authors"
copyright = "2026, the finemoe authors"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "docs/*.md", "docs/*/*.md"]
exclude_patterns = ["docs/_build/**"]
html_theme = "furo"
html_title = "finemoe"
myst_heading_anchors = 3
