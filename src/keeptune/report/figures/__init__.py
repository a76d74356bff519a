"""The PNG and SVG files that commands write, by matplotlib: a file for each family of figures."""
