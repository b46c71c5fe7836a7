"""What the two models are made of: networks, losses, averages."""
