"""Operators, one folder each.

The folder's ``__init__`` is the door (shapes, dtypes, errors), ``naive`` the truth, ``native`` the
vectorised torch that runs on CPUs.
"""
