"""`jaxlm convert`, from a clone: jaxlm/commands/convert.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("convert")
