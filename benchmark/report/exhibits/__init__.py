"""Questions with their answers: one exhibit a file."""
