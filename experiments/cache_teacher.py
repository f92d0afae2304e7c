"""`jaxlm cache_teacher`, from a clone: jaxlm/commands/cache_teacher.py."""

from jaxlm.commands.program import run

if __name__ == "__main__":
    run("cache_teacher")
