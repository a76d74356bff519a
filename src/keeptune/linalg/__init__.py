"""Pure linear algebra, float32 and float64, each function with its law."""
