"""Make Hugging Face vision-language models cheaper to run, by changing how the language model treats image tokens."""

__version__ = "0.1.0"
