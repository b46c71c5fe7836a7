"""Images, from what the user names to a batch."""
