"""``python -m stateferry``."""

from stateferry.cli import main

if __name__ == "__main__":
    main()
