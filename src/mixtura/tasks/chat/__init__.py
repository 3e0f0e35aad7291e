"""Chat and instruction tuning: a pretrained model learns the assistant's answers of somebody's own chats."""
