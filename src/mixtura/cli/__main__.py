"""`python -m mixtura.cli`, where the script is not installed."""

from mixtura.cli import main

main()
