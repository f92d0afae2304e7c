"""jaxlm: language models made smaller, faster and cheaper, with pure functions over parameter trees."""
