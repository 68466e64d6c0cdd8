"""`python -m dittools`."""

from dittools.cli import main

if __name__ == "__main__":
    main()
