"""The planner's page: sliders over what the simulator found, in one file that needs no server.

`grid.json` is made by `benchmarks/planner_grid.py`; `page` is what a browser gets, and
`one_file` puts both together.
"""
