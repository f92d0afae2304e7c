"""From a config to objects and runs: set-up, stages, pipelines, searches."""
