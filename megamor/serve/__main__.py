"""`megamor serve` is `megamor serve`."""

from megamor.cli.serve import main

if __name__ == "__main__":
    main()
