"""Takes jobs, starts `jaxtune train`, reads what it writes, and makes models of it."""
