"""Loading models, finding their linear maps, passing data through them."""
