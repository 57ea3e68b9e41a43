"""Which numbers of a batch count, and what each costs, for every kind of head."""
