"""Which setting to use, and what choosing it is worth."""
