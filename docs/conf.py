"""How Sphinx builds these pages: ``make docs``, which fails on a warning, such as a broken link."""

project = "lockstep"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
