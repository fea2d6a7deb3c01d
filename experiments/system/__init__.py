"""The machine, its processes, files and terminal: what every command stands on."""
