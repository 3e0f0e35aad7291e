"""Text classification: a pretrained model, as much of it as is trained, and a head."""
