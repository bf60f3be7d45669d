"""Sphinx: pages in Markdown (MyST), the API reference from the docstrings, formulas as MathML.

Nothing is fetched, neither while building nor while reading: no CDN, no font, no other project's index. `make docs`
and tests/test_docs.py build with warnings as errors. Relies on mathml.py beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

from drsl_kernels import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "drsl_kernels"
version = release = __version__
copyright = "the authors of drsl_kernels"
html_title = f"{project} {version}"

extensions = ["mathml", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
html_copy_source = False
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["evidence/*/*/report.md"]  # what a command wrote, kept beside the page that tells of it
smartquotes = False

# In docstrings `name` links to a public name, and is code where there is none.
default_role = "py:obj"
add_module_names = False
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False  # "The loss: a scalar" under Returns names what comes back, not its type

# One signature a function: its overloads differ in return_stats alone, which the docstring explains.
analyzer = ModuleAnalyzer.for_module("drsl_kernels.functional")
analyzer.analyze()
analyzer.overloads.clear()
