"""Statistics over rows, and the published figures they are compared with."""
