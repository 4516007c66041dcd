"""`python -m wasi_export` is the command `wasi-export`."""

from wasi_export.cli import main

if __name__ == "__main__":
    main()
