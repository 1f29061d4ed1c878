"""From files to batches: formats → templates → encode → packing → pipeline. numpy only, no jax."""
