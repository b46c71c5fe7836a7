"""What a run did, for people to look at: curves, a report, a page."""
