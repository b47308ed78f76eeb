"""The documentation site: `python -m nox -s docs`, then open docs/_build/html/index.html."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer

import ktmoe


if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "ktmoe"
author = "The ktmoe authors"
copyright = "The ktmoe authors, Apache-2.0"
version = release = ktmoe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False  # types of torch and transformers have no pages here

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and types
napoleon_use_rtype = False

highlight_language = "none"  # blocks that name no language are drawings

html_theme = "furo"
html_title = "ktmoe"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    """The tree in design.md is drawn by hand: nothing of it is highlighted."""
    app.add_lexer("tree", TextLexer)
