"""`jaxlm inspect`, from a clone: jaxlm/commands/inspect.py."""

import importlib.util
import os
import sys
import sysconfig

if __name__ == "__main__":
    from jaxlm.commands.program import run

    run("inspect")
else:
    # Python puts a script's folder first on its path, so the scripts beside this one find it when they (or a library)
    # import the standard library's `inspect`; here they get that.
    spec = importlib.util.spec_from_file_location("inspect", os.path.join(sysconfig.get_path("stdlib"), "inspect.py"))
    sys.modules["inspect"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["inspect"])
