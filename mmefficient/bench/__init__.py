"""Measuring: timers, floors, and one command per published table."""
