"""What a run will need and take, before it runs: the very step compiled for the machine that is named."""
