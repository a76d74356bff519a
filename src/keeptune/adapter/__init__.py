"""From a plan to a stock PEFT model, and from that to a portable adapter."""
