"""`jaxlm pipeline`, from a clone: jaxlm/commands/pipeline.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("pipeline")
