"""What measures the claims of the registry, one file for each room."""
