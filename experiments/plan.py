"""`jaxlm plan`, from a clone: jaxlm/commands/plan.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("plan")
