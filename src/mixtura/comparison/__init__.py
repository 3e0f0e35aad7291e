"""The main job: train the arms of a recipe side by side and report which one this budget prefers."""
