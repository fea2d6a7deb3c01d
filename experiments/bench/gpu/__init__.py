"""The comparison on a GPU: the project's targets, each with both sides measured in one run."""
