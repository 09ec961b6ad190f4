"""Small awkward strategies, each of which proves that a seam holds; none of them is a product."""
