"""What runs in the processes that a hazard probe may take down. It imports torch."""
