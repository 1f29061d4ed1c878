"""Answers: a process of its own holds the models, and decodes concurrent requests together."""
