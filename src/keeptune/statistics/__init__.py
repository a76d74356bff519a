"""Statistics: requested by methods, collected in one pass, kept under content keys."""
