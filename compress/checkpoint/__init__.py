"""Checkpoint folders: headers (torch-free), a reader that takes slices, a writer that leaves a whole folder or none."""
