"""Tables for the terminal and for Markdown; nothing here loads matplotlib or Plotly."""
