"""The self-contained HTML pages, with figures by Plotly, and the model card."""
