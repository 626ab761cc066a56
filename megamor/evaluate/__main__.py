"""`python -m megamor.evaluate` runs `megamor evaluate`."""

from megamor.cli.evaluate import main

if __name__ == "__main__":
    main()
