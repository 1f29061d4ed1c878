"""Programs that make what the package ships, and that measure it."""
