"""What only a GPU can say about the CUDA engine: is it right there, and how fast. `python -m tests.gpu --help`."""
