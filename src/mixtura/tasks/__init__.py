"""What can be learned: language modelling, translation, classification. Each is a task and an experiment."""
