"""Small unusual strategies; each proves that an interface holds, and none is a product."""
