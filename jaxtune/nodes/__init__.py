"""Nodes: what stands in the place of an array, one kind a file. Each registers how it multiplies with `weights`."""
