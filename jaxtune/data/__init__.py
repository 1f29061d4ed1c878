"""From files to batches: reading → formats → templates → encode → packing → pipeline. numpy only, no jax."""
