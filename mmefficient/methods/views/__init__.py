"""Views: other streams of the same input, and what their logits say together. One method, one file."""
