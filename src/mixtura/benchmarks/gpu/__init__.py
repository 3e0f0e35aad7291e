"""The prepared run for a GPU machine: its stages, the files they leave, and the text that travels with them."""
