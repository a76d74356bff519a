"""Many runs side by side, and task after task."""
