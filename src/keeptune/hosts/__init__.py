"""keeptune inside the trainers that users already have."""
