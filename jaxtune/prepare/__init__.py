"""What a careful person does to data before training: look, clean, split, augment, report."""
