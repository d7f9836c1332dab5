"""Measures and trains what methods keep in profiles: ``python -m mmefficient.fitting --help``."""
