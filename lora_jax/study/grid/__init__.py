"""What is compared: candidates, settings, splits, and which run is next."""
