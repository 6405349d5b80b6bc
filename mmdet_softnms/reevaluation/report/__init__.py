"""A result as people read it: table, figures, pictures, page."""
