"""`python -m jaxtune` is `jaxtune`."""

from jaxtune.cli import main

main()
