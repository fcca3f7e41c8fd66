"""Measurements: our model against the engine's built-in one, in the engine. See README.md."""
