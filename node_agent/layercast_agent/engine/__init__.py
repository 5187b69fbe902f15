"""The engine: continuous batching over decoder layers that are called one by one.

The primitive underneath everything is `LayeredModel.run_layers(first, last, hidden, batch)`; a request's state is
portable at every layer boundary. `sequence`, `pages` and `scheduler` decide and know no torch; the rest executes.
"""
