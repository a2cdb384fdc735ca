"""`python -m bigray`."""

from bigray.cli import main

if __name__ == "__main__":
    main()
