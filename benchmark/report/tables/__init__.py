"""The tables of a matrix: with a line per entry (boards), all others (details), and the files they are written to (write)."""
