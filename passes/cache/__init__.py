"""State across calls: caches of keys and values."""
