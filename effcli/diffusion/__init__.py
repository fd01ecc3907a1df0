"""Diffusion pipelines: opened from a folder or by a built-in name, and measured."""
