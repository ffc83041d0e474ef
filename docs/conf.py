"""Configuration of the documentation; see https://www.sphinx-doc.org/en/master/usage/configuration.html."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

from api_pages import template_context  # noqa: E402

# -- Project ---------------------------------------------------------------------------------

info = metadata("pertura")
project = info["Name"]
author = info["Author"]
copyright = f"2026, {author}"
version = release = info["Version"]

# -- Tutorials ---------------------------------------------------------------------------------

# Sphinx reads only what lies below docs/; the notebooks live at the top, where users look for them.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
for notebook in (HERE.parent / "tutorials").glob("*.ipynb"):
    (HERE / "tutorials").mkdir(exist_ok=True)
    shutil.copy(notebook, HERE / "tutorials")

# -- General ---------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",  # after napoleon
    "api_pages",  # of the folder extensions
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
# The first is what autosummary writes.
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
default_role = "literal"
needs_sphinx = "8.1"

nitpicky = True
# A broken reference to pertura fails; to other packages, it may only be that a build without network does not know them.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(?!(pertura|baseline|benchmark|data|datasets|effects|metrics|model|module|nn|pl|pp|priors|train)\.)[a-z]\w*\..+",
    ),
    ("py:(class|data)", "Ellipsis"),
]

autosummary_generate = True
autosummary_context = template_context()
autosummary_ignore_module_all = False
autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # left to sphinx_autodoc_typehints
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_ivar = True  # attributes described in a class docstring are not objects of their own
napoleon_use_rtype = True
napoleon_use_param = True
typehints_defaults = "braces"
typehints_fully_qualified = False
always_use_bars_union = True

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "html_admonition", "html_image"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are committed with their output
nb_output_stderr = "remove"
nb_merge_streams = True

intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
    "matplotlib": ("https://matplotlib.org/stable/", None),
    "mudata": ("https://mudata.readthedocs.io/en/latest/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "pandas": ("https://pandas.pydata.org/pandas-docs/stable/", None),
    "pyro": ("https://docs.pyro.ai/en/stable/", None),
    "python": ("https://docs.python.org/3", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
    "scipy": ("https://docs.scipy.org/doc/scipy/", None),
    "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
    "sklearn": ("https://scikit-learn.org/stable/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
}
intersphinx_timeout = 10
# A build without network must not warn; the hosted site has one.
if "READTHEDOCS" not in os.environ:
    intersphinx_mapping = {}

# -- HTML ---------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "navbar_persistent": [],  # the search of the sidebar is enough
    "navigation_with_keys": False,
    "path_to_docs": "docs/",
    "show_toc_level": 2,
}
pygments_style = "default"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
