"""In and out of the ecosystem: dense checkpoints become mixtures, mixtures become files that other tools serve."""
