"""Adapters, all of them PEFT methods: mixtures of LoRA, Mixture of Tokens, expert-specialised tuning."""
