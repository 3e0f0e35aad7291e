"""`python -m mixtura`, where the script is not installed."""

from mixtura.cli import main

main()
