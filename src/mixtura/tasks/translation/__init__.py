"""Translation: from scratch with mixtures as feed-forward layers, or with a pretrained base model."""
