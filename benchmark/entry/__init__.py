"""Defenses of other people, run on the zoo and filed with what they claim."""
