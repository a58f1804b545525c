"""`python -m llama1m_ext` is the console script `llama1m`."""

from llama1m_ext.cli import main

if __name__ == "__main__":
    main()
