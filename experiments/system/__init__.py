"""The machine, its processes, files and terminal: the basis of every command."""
