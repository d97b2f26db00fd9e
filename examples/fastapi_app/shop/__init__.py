"""A shop that packs its orders in worker processes."""
