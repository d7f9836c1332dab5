"""Modulations: what attention does with the tokens it has. One method, one file."""
