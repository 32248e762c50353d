"""The streaming executor: stock decoder layers, one at a time in memory, fed with all windows."""
