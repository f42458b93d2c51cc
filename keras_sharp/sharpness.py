"""How sharp a minimum is: measures of a model on data."""
