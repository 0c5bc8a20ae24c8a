"""What fusesnap costs, measured; each module is a program that ``scripts/bench`` starts by name."""
