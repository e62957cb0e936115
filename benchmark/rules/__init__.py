"""The rules of the comparison: scores, the gate, selection, tracks, canaries."""
