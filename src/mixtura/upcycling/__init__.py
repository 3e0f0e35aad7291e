"""A dense checkpoint becomes a mixture, with a receipt of what was done."""
