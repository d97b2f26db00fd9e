"""What a million results cost: `make bench-large`."""
