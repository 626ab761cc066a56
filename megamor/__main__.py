"""`python -m megamor` is the `megamor` command."""

from megamor.cli import main

main()
