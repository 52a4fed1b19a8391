"""The site's settings. The source folder is the repository itself, so a link works here as it does in a clone.

make docs            build/docs/index.html; the tutorials run with little work
make docs FULL=1     the tutorials run whole, as a reader runs them: half an hour
"""

import os
import pathlib
import sys
import urllib.request

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "fedjax_clip"
copyright = "the authors of fedjax_clip, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "reference",  # docs/reference.py
]
root_doc = "docs/index"
include_patterns = ["docs/**", "colab/*.ipynb", "benchmarks/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "dist", "runs", "node_modules", "**/.ipynb_checkpoints"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["ref.python"]  # a type that two modules have, as fc.extend.Client and fc.secure.Client

# Notebooks: an error or a warning of a cell is one of the build.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = str(ROOT)
if "FULL" not in os.environ:
    os.environ["FEDJAX_CLIP_SHORT"] = "1"
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 1800
nb_execution_raise_on_error = True
nb_output_stderr = "warn"

# Docstrings: Google's sections. Types and defaults are shown as the source writes them.
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"

# References to JAX and optax, where their inventories can be had. Without a network the names stay plain.
intersphinx_mapping = {}
for name, url in {"jax": "https://docs.jax.dev/en/latest/", "optax": "https://optax.readthedocs.io/en/latest/"}.items():
    try:
        urllib.request.urlopen(url + "objects.inv", timeout=5).close()
        intersphinx_mapping[name] = (url, None)
    except OSError:
        print(f"{url} cannot be reached: names of {name} are not links")

maximum_signature_line_length = 100
html_theme = "sphinx_book_theme"
html_title = "fedjax_clip"
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "use_download_button": False}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):
    """Says of a tutorial that ran with little work that it did, and leads from the site's root to its first page."""
    note = '<p class="admonition note">This page was built with fewer rounds and smaller models than its text says: \
the outputs show the form, not the figures. <code>make docs FULL=1</code> builds it whole.</p>'

    def say(app, pagename, templatename, context, doctree):
        if pagename.startswith("colab/") and "FULL" not in os.environ:
            context["body"] = note + context["body"]

    def lead(app, exception):
        page = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        (pathlib.Path(app.outdir) / "index.html").write_text(page)

    app.connect("html-page-context", say)
    app.connect("build-finished", lead)
