"""`python -m experiments.dry_run`."""

from experiments.dry_run.running import main

if __name__ == "__main__":
    main()
