"""A run on disk: its configuration, results and checkpoints; how it goes on; runs of a sweep."""
