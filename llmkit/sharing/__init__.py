"""What leaves the machine: the files that are shared, the model card, the Hub."""
