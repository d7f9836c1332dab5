"""What is computed for visual rows."""
