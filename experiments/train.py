"""`jaxlm train`, from a clone: jaxlm/commands/train.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("train")
