"""Which query-key pairs exist while a prompt is read."""
