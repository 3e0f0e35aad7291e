"""Fine-tuning with mixtures: adapters, translation and classification, each run like any other training."""
