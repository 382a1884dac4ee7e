"""One self-contained page about any runs, sweeps and comparisons: no network, no server, no script that it would need. It imports no torch.

runs.py       what the folder of one run says
studies.py    the runs that answer one question together: a comparison, or those on the same data
svg.py        a chart as an SVG element, its colours left to the style sheet
charts.py     which charts a study has
sections.py   its sentences and tables
document.py   the page around them
markup.py     elements of HTML
page.css, page.js
"""
