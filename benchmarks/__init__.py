"""The speed of taskiq_sa_pg beside taskiq-postgres and bare asyncpg: `make bench`."""
