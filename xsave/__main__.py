"""`python -m xsave` is the command `xsave`."""

from xsave.cli import main

if __name__ == "__main__":
    main()
