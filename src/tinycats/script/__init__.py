"""What every script begins and ends with: its command line, its signals, where it runs, what a user is told."""
