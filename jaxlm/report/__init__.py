"""Reports: which model to ship, with every number and how it was measured."""
