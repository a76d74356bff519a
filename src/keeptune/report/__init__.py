"""Tables, figures and the self-contained HTML page made from a `report.json`.

Import from the submodules (`keeptune.report.tables.comparison_table`, `.plots`, `.html`): printing a table must not
load matplotlib.
"""
