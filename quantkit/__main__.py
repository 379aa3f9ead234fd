"""`python -m quantkit` is the command `quantkit`."""

from quantkit.cli.main import main

main()
