"""Reducers: which visual tokens exist from a site on. One method, one file."""
