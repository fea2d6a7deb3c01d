"""Plan a run before anybody runs it: memory to the byte, FLOPs, hours, on one GPU and on many."""
