"""From chat messages to token ids, through the chat template of a model."""
