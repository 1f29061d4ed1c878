"""Named tasks, one a file: a row becomes a conversation, a prediction becomes a score."""
