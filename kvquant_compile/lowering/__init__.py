"""From plans and tables to the two ops and what runs them."""
