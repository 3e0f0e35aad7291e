"""A mixture becomes a file that other tools serve, with a receipt of what it computes."""
