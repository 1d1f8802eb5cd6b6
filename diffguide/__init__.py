"""Steer attention in diffusers pipelines, without training anything."""

__version__ = "0.1.0"
