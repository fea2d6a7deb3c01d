"""A report over the results in a folder: a tidy table, statistics, plots, one page."""
