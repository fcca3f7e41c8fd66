"""Operators, one folder each: the door (shapes, dtypes, errors), ``naive`` (the truth) and ``native`` (vectorised torch)."""
