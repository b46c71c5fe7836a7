"""What is trained: the classifier and TinyDiT; their losses, samples and files."""
