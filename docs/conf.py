"""Sphinx: ``sphinx-build -W -b html docs docs/_build/html``. Markdown that GitHub renders, too; API from docstrings.

Sphinx with furo and MyST rather than mkdocs-material, which is in maintenance mode: Sphinx reads the docstrings of
compiled and lazily imported names without a further plug-in.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mmdet_softnms  # noqa: E402

project = 'mmdet_softnms'
author = copyright = 'mmdet_softnms contributors'
release = version = mmdet_softnms.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
myst_heading_anchors = 3
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'mmdet_softnms {release}'
autodoc_typehints = 'description'
autodoc_member_order = 'bysource'


def link_to_sources(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to files outside of docs/ are links into the clone that the pages were built in; dead ones are warnings."""

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ''
        if not (ROOT / target).exists():
            logging.getLogger(__name__).warning('%s links to %s, which does not exist', name, target)
        if Path(target).suffix in ('.png', '.svg'):
            return match[0]  # a picture: Sphinx copies it
        return f']({(ROOT / target).as_uri()}{anchor})'

    source[0] = re.sub(r'\]\(\.\./([^)#]+)(#[^)]*)?\)', replaced, source[0])


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect('source-read', link_to_sources)
