"""`python -m conelens.cli`."""

from conelens.cli import main

main()
