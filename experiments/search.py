"""`jaxlm search`, from a clone: jaxlm/commands/search.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("search")
