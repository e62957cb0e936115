"""Checks of the suite itself: rows repeated, processes killed, files damaged, executors scaled."""
