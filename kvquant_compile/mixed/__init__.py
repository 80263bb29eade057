"""Mixed precision: a width for every layer's keys and values, chosen under a budget of bytes."""
