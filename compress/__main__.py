"""`python -m compress`: the same as the script `autoglm-compress`."""

from compress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
