"""The command line: local clusters, their views, and the demo that scales a real model while it serves."""
