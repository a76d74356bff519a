"""From JSONL to tokens and masks."""
