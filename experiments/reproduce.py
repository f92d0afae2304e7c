"""`jaxlm reproduce`, from a clone: jaxlm/commands/reproduce.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("reproduce")
