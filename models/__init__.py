"""Model families: one short adapter each, and the embedded reference model."""
