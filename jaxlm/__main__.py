"""`python -m jaxlm PROGRAM`: the command `jaxlm`, with a Python of one's choice."""

from jaxlm.commands import main

if __name__ == "__main__":
    main()
