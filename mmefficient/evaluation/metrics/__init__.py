"""Scorers: functions from records and outputs to named `Ratio`s."""
