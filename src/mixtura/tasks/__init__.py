"""What can be learned: language modelling, translation, classification, chat. Each is a task and an experiment."""
