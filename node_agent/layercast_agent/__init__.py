"""The node agent and its workers: everything of Layercast that runs on a node."""
