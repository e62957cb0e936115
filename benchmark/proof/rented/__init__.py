"""A matrix on a machine rented by the minute: what is carried there, and how it is run. ``__main__`` has the commands."""
