"""Scores of predictions against references: numpy, scikit-learn, sacrebleu, rouge-score; no jax."""
