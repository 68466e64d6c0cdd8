"""`python app.py`: the studio, without installing the command line."""

import sys

from dittools.cli import main

if __name__ == "__main__":
    main(["studio", *sys.argv[1:]])
