"""What stands on the pages under docs/results/, by subject."""
