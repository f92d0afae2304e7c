"""From a config to objects: models, data, methods, and the stages that run them."""
