"""The interactive demo (needs the `demo` extra)."""
