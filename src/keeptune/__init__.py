"""keeptune: fine-tune a language model without destroying what it already knows."""
