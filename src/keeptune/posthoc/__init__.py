"""keeptune repair: an adapter that has forgotten, mended after training."""
