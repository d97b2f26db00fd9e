"""`python -m taskiq_sa_pg` is the command `taskiq-sa-pg`."""

from taskiq_sa_pg.cli import main

if __name__ == "__main__":
    main()
