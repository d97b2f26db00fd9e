"""The speed of the backend, beside that of others: `make bench` and `make bench-large`."""
