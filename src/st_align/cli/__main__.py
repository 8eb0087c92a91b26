"""`python -m st_align.cli`."""

from st_align.cli import main

main()
