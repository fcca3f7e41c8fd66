"""The one version string of the package (setup.py reads this file as text)."""

__version__ = "0.1.0.dev0"
