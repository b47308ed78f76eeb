"""`python -m ktmoe.cli`: the same as the console script."""

from ktmoe.cli import main


if __name__ == "__main__":
    main()
