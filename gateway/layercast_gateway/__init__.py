"""Layercast."""
