"""Comparisons of methods with enough power: a study as data, its jobs, its statistics."""
