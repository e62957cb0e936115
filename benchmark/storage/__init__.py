"""What is kept on disk: files written whole, the store of finished stages, rows, and what a machine computes with."""
