"""Tree reducers: several parameter trees of one shape become one."""
