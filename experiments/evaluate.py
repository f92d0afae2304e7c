"""`jaxlm evaluate`, from a clone: jaxlm/commands/evaluate.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("evaluate")
