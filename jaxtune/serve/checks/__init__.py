"""Training files, looked through before anything is trained on them."""
