"""Plans: who writes what, where it lies in a file, what a load must read. Pure: no I/O, no collectives, no live tensors."""
