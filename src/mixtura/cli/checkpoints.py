"""Verbs that turn one checkpoint into another."""
